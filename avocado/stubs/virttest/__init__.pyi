"""What our tests use of avocado-vt, which has no type hints."""
