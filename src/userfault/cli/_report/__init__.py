"""Parts of `userfault report`."""
