"""The kernel matrix: `make test-kernels` runs the kernel and engine tests on real Linux kernels in QEMU."""
