// SPDX-License-Identifier: Apache-2.0
// Pins: ranges that stay resident, for memory that devices write to. Few at a time, so a list of them will do.
#include <stdlib.h>

#include "internal.h"

enum { PINS_MOST = 1 << 16 };

bool uf_pinned(const struct uf_memory *m, uint64_t block)
{
	for (unsigned i = 0; i < m->npins; i++)
		if (block >= m->pins[i].first && block - m->pins[i].first < m->pins[i].count)
			return true;
	return false;
}

static int add(struct uf_memory *m, uint64_t first, uint64_t count)
{
	if (m->npins == m->pins_capacity) {
		unsigned capacity = m->pins_capacity ? m->pins_capacity * 2 : 16;
		void *more = capacity > PINS_MOST ? NULL : realloc(m->pins, capacity * sizeof(*m->pins));
		if (!more)
			return -ENOMEM;
		m->pins = more;
		m->pins_capacity = capacity;
	}
	m->pins[m->npins].first = first;
	m->pins[m->npins++].count = count;
	return 0;
}

// There, and where devices may write known to be dirty.
static bool ready(const struct uf_memory *m, enum uf_state s)
{
	return s == UF_DIRTY || s == UF_REINSTALLED || s == UF_UPGRADING || (!m->store && s == UF_CLEAN);
}

int uf_memory_pin(struct uf_memory *m, uint64_t first, uint64_t count, struct uf_failure *why)
{
	struct uf_pager *p = m->pager;
	why->err = 0;
	why->message[0] = 0;
	if (!count || first >= m->nblocks || count > m->nblocks - first)
		return -ERANGE;
	pthread_mutex_lock(&p->lock);
	// First the pin, then the pages: what comes in now does not leave again.
	int err = atomic_load_explicit(&m->closed, memory_order_relaxed) ? -EBADF : add(m, first, count);
	pthread_mutex_unlock(&p->lock);
	if (err)
		return err;
	bool all = false;
	for (unsigned tries = 0; !err && !all && tries < 1000; tries++) { // an eviction that had begun before it may end after it
		err = uf_memory_prefetch(m, first, count, true, why);
		// A device that got hold of the pages writes behind any protection: they are dirty from now on. And system calls can
		// write to them where the kernel's own faults are not ours to serve.
		for (uint64_t b = first; b < first + count && m->store && !err; b++)
			if (UF_STATE(uf_word(m, b)) == UF_CLEAN || UF_STATE(uf_word(m, b)) == UF_RESTORED)
				uf_upgrade(m, b);
		pthread_mutex_lock(&p->lock);
		all = true;
		for (uint64_t b = first; b < first + count && all; b++)
			all = ready(m, UF_STATE(uf_word(m, b)));
		if (!err && !all)
			uf_wait_changed(p, 1);
		pthread_mutex_unlock(&p->lock);
	}
	if (!err && !all)
		err = -EBUSY;
	if (err)
		uf_memory_unpin(m, first, count);
	return err;
}

int uf_memory_unpin(struct uf_memory *m, uint64_t first, uint64_t count)
{
	struct uf_pager *p = m->pager;
	int err = -ENOENT;
	pthread_mutex_lock(&p->lock);
	for (unsigned i = m->npins; i-- && err;) {
		if (m->pins[i].first != first || m->pins[i].count != count)
			continue;
		m->pins[i] = m->pins[--m->npins];
		err = 0;
	}
	pthread_mutex_unlock(&p->lock);
	return err;
}
