// SPDX-License-Identifier: Apache-2.0
// Our handler of SIGBUS, for direct delivery (direct.c), and whoever stood there before: what is no fault of ours is passed on to
// him as if we were not there.
#include <signal.h>
#include <stdlib.h>

#include "internal.h"

struct previous {
	struct sigaction action;
	struct previous *next;
};

static _Atomic(struct previous *) all_previous; // never freed: handlers read them
static _Atomic(struct previous *) previous;     // who stood there before us; NULL: the default
UF_HANDLER_LOCAL bool passing;                     // this thread is inside that handler, as far as we know

// Who stood there before us may pass it on to us in turn (faulthandler, enabled after us and then put behind us): it calls us
// with what we gave it, or raises the signal again. The kernel clears the end of what it hands to a handler.
static uint64_t *mark_of(siginfo_t *info)
{
	return (uint64_t *)(void *)((char *)info + sizeof(*info) - sizeof(uint64_t));
}

static const uint64_t MARK = 0x7566207061737365;

static bool has_handler(const struct previous *next)
{
	return next && ((next->action.sa_flags & SA_SIGINFO) ||
			(next->action.sa_handler != SIG_DFL && next->action.sa_handler != SIG_IGN));
}

// Calls the handler that stood there before us with the mask that it would have had.
static void call(const struct previous *next, int number, siginfo_t *info, void *context)
{
	const struct sigaction *a = &next->action;
	sigset_t mask, full;
	sigfillset(&full);
	sigorset(&mask, &((ucontext_t *)context)->uc_sigmask, &a->sa_mask);
	if (!(a->sa_flags & SA_NODEFER))
		sigaddset(&mask, number);
	if (a->sa_flags & SA_RESETHAND)
		atomic_store_explicit(&previous, NULL, memory_order_relaxed);
	uint64_t unmarked = *mark_of(info);
	*mark_of(info) = MARK;
	passing = true;
	pthread_sigmask(SIG_SETMASK, &mask, NULL);
	if (a->sa_flags & SA_SIGINFO)
		a->sa_sigaction(number, info, context);
	else
		a->sa_handler(number);
	pthread_sigmask(SIG_SETMASK, &full, NULL);
	passing = false;
	*mark_of(info) = unmarked;
	// It raised the signal for who comes next, and that is us: as above.
	sigset_t waiting;
	if (!sigpending(&waiting) && sigismember(&waiting, number) && uf_direct_armed())
		signal(number, SIG_DFL);
}

// Whoever stood there before. If it was the default, the instruction is tried again under it, and kills.
static void chain(int number, siginfo_t *info, void *context)
{
	// An instruction that faults raises it again by itself; what somebody sent, or the kernel tells of broken memory, is over.
	bool again = info->si_code > 0 && info->si_code != BUS_MCEERR_AO;
	bool loop = *mark_of(info) == MARK || (passing && !again);
	struct previous *next = atomic_load_explicit(&previous, memory_order_acquire);
	if (!loop && has_handler(next)) {
		call(next, number, info, context);
	} else if (loop || again || !next || next->action.sa_handler != SIG_IGN) {
		signal(number, SIG_DFL);
		if (!again)
			raise(number);
	}
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	// AR: poison, on a kernel that knows of broken memory.
	bool fault = (info->si_code == BUS_ADRERR || info->si_code == BUS_MCEERR_AR) && *mark_of(info) != MARK;
	if (!fault || !uf_direct_serve(info, context))
		chain(number, info, context);
	errno = saved;
}

// --- our handler in its place

static bool is_handler(const struct sigaction *a)
{
	return a->sa_flags & SA_SIGINFO && a->sa_sigaction == on_sigbus;
}

bool uf_direct_armed(void)
{
	struct sigaction now;
	return !sigaction(SIGBUS, NULL, &now) && is_handler(&now);
}

static int publish(const struct sigaction *a)
{
	struct previous *q = atomic_load_explicit(&all_previous, memory_order_acquire);
	while (q && (q->action.sa_handler != a->sa_handler || q->action.sa_flags != a->sa_flags))
		q = q->next;
	if (!q) {
		q = calloc(1, sizeof(*q));
		if (!q)
			return -ENOMEM;
		q->action = *a;
		q->next = atomic_load_explicit(&all_previous, memory_order_relaxed);
		// Release: pairs with the acquire of who walks the list.
		while (!atomic_compare_exchange_weak_explicit(&all_previous, &q->next, q, memory_order_release, memory_order_relaxed))
			;
	}
	atomic_store_explicit(&previous, q, memory_order_release);
	return 0;
}

// Without a lock, so that a fork in between does no harm: two threads that do it at once publish the same.
int uf_direct_arm(void)
{
	struct sigaction ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART}, old;
	sigfillset(&ours.sa_mask);
	if (sigaction(SIGBUS, NULL, &old))
		return -errno;
	if (is_handler(&old))
		return 0;
	int err = publish(&old); // first: from the next call on somebody needs it
	if (!err && sigaction(SIGBUS, &ours, &old))
		err = -errno;
	if (!err && !is_handler(&old))
		err = publish(&old);
	return err;
}
