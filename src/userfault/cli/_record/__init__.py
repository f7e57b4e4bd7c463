"""The parts of `userfault record`."""
