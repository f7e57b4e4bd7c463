// Bare fill loop: an empty anonymous region filled from memory without a single fault.
//
// usage: fill copy|move BYTES BYTES_PER_CALL
//
//   copy  UFFDIO_COPY of BYTES_PER_CALL bytes at a time, straight from the source.
//   move  memcpy into a 2 MiB huge-page staging area, then UFFDIO_MOVE of it (Linux 6.8); BYTES_PER_CALL is ignored.
//
// Prints one JSON object: {"value": GB/s}.
#define _GNU_SOURCE
#include "touch.h"
#include "uffd.h"

static const size_t HUGE_SIZE = 2u << 20;

// Both ioctls may stop early with EAGAIN and a positive count: go on behind it.
static void fill(int fd, unsigned long request, const char *name, char *dst, const char *src, size_t len)
{
	while (len) {
		struct uffd_fill call = { .dst = (uintptr_t)dst, .src = (uintptr_t)src, .len = len };
		if (!ioctl(fd, request, &call))
			return;
		if (errno != EAGAIN)
			die(name);
		if (call.done > 0) {
			dst += call.done;
			src += call.done;
			len -= (size_t)call.done;
		}
	}
}

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: fill copy|move BYTES BYTES_PER_CALL\n");
		return 2;
	}
	int move = !strcmp(argv[1], "move");
	size_t bytes = strtoull(argv[2], NULL, 0) & ~(HUGE_SIZE - 1);
	size_t per_call = move ? HUGE_SIZE : strtoull(argv[3], NULL, 0);

	char *source = map_aligned(bytes);
	uint64_t expected = 0;
	for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
		uint64_t word = (i + 1) * 0x9e3779b97f4a7c15u;
		memcpy(source + i, &word, sizeof(word));
		expected += word;
	}
	char *region = map_aligned(bytes);
	char *staging = map_aligned(HUGE_SIZE);
	if (move && madvise(staging, HUGE_SIZE, MADV_HUGEPAGE))
		die("madvise(MADV_HUGEPAGE)");
	int fd = uffd_open(O_CLOEXEC, 0);
	uffd_register(fd, region, bytes, UFFD_REGISTER_MISSING);

	uint64_t start = touch_now();
	for (size_t offset = 0; offset < bytes; offset += per_call) {
		size_t len = bytes - offset < per_call ? bytes - offset : per_call;
		if (move) {
			memcpy(staging, source + offset, len);
			fill(fd, UFFD_MOVE_IOCTL, "UFFDIO_MOVE", region + offset, staging, len);
		} else {
			fill(fd, UFFD_COPY_IOCTL, "UFFDIO_COPY", region + offset, source + offset, len);
		}
	}
	uint64_t elapsed = touch_now() - start;

	uint64_t sum = 0;
	for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
		uint64_t word;
		memcpy(&word, region + i, sizeof(word));
		sum += word;
	}
	if (sum != expected) {
		fprintf(stderr, "wrong bytes: checksum differs\n");
		return 1;
	}
	printf("{\"value\": %.3f}\n", (double)bytes / (double)elapsed);
	return 0;
}
