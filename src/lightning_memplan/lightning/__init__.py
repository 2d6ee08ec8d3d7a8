"""Everything that is touched inside Lightning, each private interface behind one function."""
