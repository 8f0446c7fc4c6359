"""The parts of avocado-vt that the tests use. It has no type hints of its own."""
