// SPDX-License-Identifier: Apache-2.0
// Pages that others still read when their block is evicted: vmsplice takes plain references, which no call refuses. What is
// in the pipe must stay what the array said, whatever the memory does with its pages afterwards.
#include <fcntl.h>
#include <sys/uio.h>

#include "support.h"

enum { LENGTH = 64 << 20, BUDGET = 16 << 20, SPLICED = 64 << 10 };

static void spliced(uint64_t block)
{
	struct uf_pager *p = test_pager(1 << 30);
	struct uf_memory_options o = {
		.nbytes = LENGTH,
		.block = block,
		.budget = BUDGET,
		.source = UF_SOURCE_MEMORY,
		.address = test_reference(LENGTH),
	};
	struct uf_memory *m;
	struct uf_failure why;
	test_memory_source(p, &o, &m);
	char *at = uf_memory_address(m);
	static uint8_t got[SPLICED];
	uint64_t per = UF_EXTENT / block;
	for (uint64_t start = 0; start + UF_EXTENT <= LENGTH / 2; start += UF_EXTENT) {
		int fds[2];
		CHECK(pipe(fds) == 0 && fcntl(fds[1], F_SETPIPE_SZ, 2 * SPLICED) > 0);
		CHECK(uf_memory_prefetch(m, start / block, per, true, &why) == 0, "%s", why.message);
		struct iovec v = {at + start, SPLICED};
		CHECK(vmsplice(fds[1], &v, 1, 0) == SPLICED);
		// Out of the memory, and others in: more than the budget, in extents and by single blocks.
		for (uint64_t k = 1; k <= 10; k++)
			CHECK(uf_memory_prefetch(m, (start + k * UF_EXTENT) % LENGTH / block, per, true, &why) == 0);
		uf_memory_evict(m, 0, LENGTH / block);
		CHECK(uf_memory_prefetch(m, (start + UF_EXTENT) / block, per, true, &why) == 0);
		for (size_t done = 0; done < SPLICED;) {
			ssize_t n = read(fds[0], got + done, SPLICED - done);
			CHECK(n > 0);
			done += (size_t)n;
		}
		uint64_t wrong = test_differs(got, start, SPLICED);
		CHECK(wrong == UINT64_MAX, "byte %llu of what was spliced changed", (unsigned long long)wrong);
		close(fds[0]);
		close(fds[1]);
	}
	uf_memory_destroy(m);
	test_end(p);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	test_reference(LENGTH);
	spliced(65536);
	spliced(2 << 20);
	return 0;
}
