"""Events → program → allocator → estimate: pure arithmetic on numbers, without torch."""
