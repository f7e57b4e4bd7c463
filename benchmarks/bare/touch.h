// The faulting side of the random-fault rows: one loop, compiled into the bare program and into the helper library
// that the userfault side calls, so that both time exactly the same thing.
#ifndef BARE_TOUCH_H
#define BARE_TOUCH_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

struct touch_result {
	double mean_ns, p50_ns, p99_ns;
	uint64_t checksum; // sum of the first word of every page, as it was
};

static inline uint64_t touch_random(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static inline uint64_t touch_now(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int touch_compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

// The numbers below `pages` in an order that depends on `seed` only; NULL without memory.
static inline uint32_t *touch_order(size_t pages, uint64_t seed)
{
	uint32_t *order = malloc(pages * sizeof(*order));
	if (!order)
		return NULL;
	for (size_t i = 0; i < pages; i++)
		order[i] = (uint32_t)i;
	uint64_t state = seed * 0x9e3779b97f4a7c15u + 1;
	for (size_t i = pages - 1; i > 0; i--) {
		size_t j = touch_random(&state) % (i + 1);
		uint32_t swap = order[i];
		order[i] = order[j];
		order[j] = swap;
	}
	return order;
}

// Reads one word of each of `pages` pages, every page once, in random order; with `write`, turns its bits over, too.
// Returns 0, or -1 without memory for the order and the times.
static inline int touch_pages(char *base, size_t pages, size_t page_size, uint64_t seed, int write,
			      struct touch_result *ret)
{
	uint32_t *order = touch_order(pages, seed);
	uint32_t *times = malloc(pages * sizeof(*times));
	if (!order || !times) {
		free(order);
		free(times);
		return -1;
	}
	for (size_t i = 0; i < pages; i++)
		times[i] = 0; // present before the clock starts

	uint64_t checksum = 0;
	uint64_t start = touch_now();
	uint64_t last = start;
	for (size_t i = 0; i < pages; i++) {
		volatile uint64_t *word = (volatile uint64_t *)(base + (size_t)order[i] * page_size);
		uint64_t value = *word;
		if (write)
			*word = ~value;
		checksum += value;
		uint64_t now = touch_now();
		times[i] = (uint32_t)(now - last);
		last = now;
	}

	ret->mean_ns = (double)(last - start) / (double)pages;
	qsort(times, pages, sizeof(*times), touch_compare);
	ret->p50_ns = times[pages / 2];
	ret->p99_ns = times[pages * 99 / 100];
	ret->checksum = checksum;
	free(order);
	free(times);
	return 0;
}

#endif
