import pytorch_lightning as pl
from image_classifier import Classifier, Digits  # examples/image_classifier.py: a ResNet-50

import lightning_memplan as mp

planner = mp.MemoryPlanner()
data = Digits(size=224)  # data.batch_size is 8
trainer = pl.Trainer(accelerator="gpu", devices=1, precision="16-mixed", max_steps=3, callbacks=[planner])
trainer.fit(Classifier(), datamodule=data)
for m in planner.measurements:
    print(f"step {m.step}: {m.predicted_reserved:,} bytes reserved predicted, {m.reserved:,} measured")
