"""The parts of `userfault watch`: the other end of the socket that a watched process opens."""
