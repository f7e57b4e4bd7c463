// SPDX-License-Identifier: Apache-2.0
#include "array_maps.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
	HUGE = 2 << 20,
	HUGE_FROM = 4 << 20, // NumPy advises huge pages for arrays of this size
	// What is kept of brief arrays for the next one. The C library does likewise: it maps what is above 32 MiB anew each
	// time, and keeps smaller ones on the heap.
	SPARES = 16,
	SPARE_MOST = 32 << 20,
	SPARES_MOST = 64 << 20,
};

static struct uf_array_map spares[SPARES];
static unsigned count;
static uint64_t bytes;

size_t uf_array_pages_up(size_t size)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	return (size + page - 1) & ~(page - 1);
}

bool uf_array_map(size_t length, enum uf_array_pages pages, struct uf_array_map *ret)
{
	size_t slack = length >= HUGE_FROM ? HUGE : 0;
	if (length > SIZE_MAX - slack)
		return false;
	char *all = mmap(NULL, length + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (all == MAP_FAILED)
		return false;
	char *at = all;
	if (slack) {
		at = (char *)(((uintptr_t)all + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
		if (at > all)
			munmap(all, (size_t)(at - all));
		if (at < all + slack)
			munmap(at + length, (size_t)(all + slack - at));
	}
	if (pages == UF_ARRAY_PAGES_HUGE && slack)
		madvise(at, length, MADV_HUGEPAGE);
	else if (pages == UF_ARRAY_PAGES_SMALL)
		madvise(at, length, MADV_NOHUGEPAGE);
	*ret = (struct uf_array_map){(uintptr_t)at, length};
	return true;
}

void uf_array_unmap(struct uf_array_map map)
{
	int saved = errno;
	if (map.mapped)
		munmap((void *)map.address, map.mapped);
	errno = saved;
}

static struct uf_array_map take(unsigned at)
{
	struct uf_array_map map = spares[at];
	bytes -= map.mapped;
	memmove(&spares[at], &spares[at + 1], (--count - at) * sizeof(*spares));
	return map;
}

bool uf_array_spare_take(size_t length, struct uf_array_map *ret)
{
	for (unsigned i = count; i-- > 0;) {
		if (spares[i].mapped >= length && spares[i].mapped - length <= length / 8) {
			*ret = take(i);
			return true;
		}
	}
	return false;
}

bool uf_array_spare_keep(struct uf_array_map map)
{
	if (map.mapped > SPARE_MOST)
		return false;
	while (count == SPARES || bytes + map.mapped > SPARES_MOST)
		uf_array_unmap(take(0));
	spares[count++] = map;
	bytes += map.mapped;
	return true;
}

void uf_array_spares_end(void)
{
	while (count)
		uf_array_unmap(take(0));
}

uint64_t uf_array_spare_bytes(void)
{
	return bytes;
}
