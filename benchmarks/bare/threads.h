// Threads that touch pages at the same time: for rows on several readers. Shared by the bare program and the helper
// library, so that both do exactly the same.
#ifndef BARE_THREADS_H
#define BARE_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "touch.h"

struct threads_log {
	uint64_t begun, ended; // CLOCK_MONOTONIC, ns
};

enum { THREADS_RUN = 16 }; // pages that a thread takes at a time

// `threads` is a multiple of `memories`. Each page of each memory is read once; the threads of a memory take its pages in
// turn, so that none ends long before the others.
struct threads_plan {
	uint32_t threads, memories;
	char *const *bases;
	uint64_t pages, page_size, seed; // pages: of one memory
	uint32_t cpus;                   // thread i runs on CPU i modulo this; 0: anywhere
	uint32_t reserved;
	struct threads_log *log; // room for all pages of all memories, or NULL
};

struct threads_result {
	uint64_t elapsed_ns; // from the common start to the end of the last thread
	uint64_t checksum;   // sum of the first word of every page
};

struct threads_part {
	const struct threads_plan *plan;
	pthread_barrier_t *start;
	char *base;
	const uint32_t *order;
	struct threads_log *log;
	_Atomic uint64_t *next; // of the memory's pages, in order
	unsigned number;
	uint64_t begun, ended, checksum;
};

static void *threads_run(void *arg)
{
	struct threads_part *part = arg;
	if (part->plan->cpus) {
		cpu_set_t set;
		CPU_ZERO(&set);
		CPU_SET(part->number % part->plan->cpus, &set);
		sched_setaffinity(0, sizeof(set), &set);
	}
	pthread_barrier_wait(part->start);
	part->begun = touch_now();
	uint64_t pages = part->plan->pages, at;
	while ((at = atomic_fetch_add_explicit(part->next, THREADS_RUN, memory_order_relaxed)) < pages) {
		for (uint64_t i = at; i < at + THREADS_RUN && i < pages; i++) {
			const volatile uint64_t *word =
				(const volatile uint64_t *)(part->base + part->order[i] * part->plan->page_size);
			if (part->log)
				part->log[i].begun = touch_now();
			part->checksum += *word;
			if (part->log)
				part->log[i].ended = touch_now();
		}
	}
	part->ended = touch_now();
	return NULL;
}

// 0, or -1 without memory or threads.
static inline int threads_touch(const struct threads_plan *plan, struct threads_result *ret)
{
	unsigned started = 0;
	struct threads_part *parts = calloc(plan->threads, sizeof(*parts));
	pthread_t *ids = calloc(plan->threads, sizeof(*ids));
	uint32_t *order = touch_order(plan->pages, plan->seed);
	_Atomic uint64_t *next = calloc(plan->memories, sizeof(*next));
	pthread_barrier_t start;
	if (!parts || !ids || !order || !next || pthread_barrier_init(&start, NULL, plan->threads))
		return -1; // a benchmark ends here: nothing is given back
	for (unsigned i = 0; i < plan->threads; i++) {
		unsigned memory = i % plan->memories;
		parts[i] = (struct threads_part){
			.plan = plan,
			.start = &start,
			.base = plan->bases[memory],
			.order = order,
			.log = plan->log ? plan->log + memory * plan->pages : NULL,
			.next = &next[memory],
			.number = i,
		};
	}
	while (started < plan->threads && !pthread_create(&ids[started], NULL, threads_run, &parts[started]))
		started++;
	if (started < plan->threads)
		return -1;
	uint64_t begun = UINT64_MAX, ended = 0;
	ret->checksum = 0;
	for (unsigned i = 0; i < plan->threads; i++) {
		pthread_join(ids[i], NULL);
		begun = parts[i].begun < begun ? parts[i].begun : begun;
		ended = parts[i].ended > ended ? parts[i].ended : ended;
		ret->checksum += parts[i].checksum;
	}
	ret->elapsed_ns = ended - begun;
	pthread_barrier_destroy(&start);
	free(next);
	free(order);
	free(ids);
	free(parts);
	return 0;
}

#endif
