"""The parts of `userfault demo`: its data, what it does with them, and how it checks the results."""
