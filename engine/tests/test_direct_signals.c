// SPDX-License-Identifier: Apache-2.0
// Direct delivery lives in a handler of SIGBUS: who stood there before keeps its bus errors, and other signals their handlers.
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/time.h>

#include "internal.h"
#include "support.h"

enum { BLOCK = 4096, LENGTH = 1 << 20, BLOCKS = LENGTH / BLOCK };

static struct uf_pager *pager;
static uint32_t source;

static struct uf_memory *create(const char *mode)
{
	struct uf_memory_options o = {.nbytes = LENGTH, .block = BLOCK, .delivery = UF_DELIVERY_DIRECT, .no_readahead = true};
	if (mode) {
		source = test_worker_source(pager, mode);
		o.source_id = source;
	}
	o.source = mode ? UF_SOURCE_WORKER : UF_SOURCE_MEMORY;
	o.address = test_reference(LENGTH);
	struct uf_memory *m;
	test_memory_source(pager, &o, &m);
	return m;
}

static void end(struct uf_memory *m, bool worker)
{
	uf_memory_destroy(m);
	if (worker)
		CHECK(uf_source_drop(pager, source) == 0);
}

// --- events that are not ours

enum event { POISONED, BROKEN, OTHER_MAPPING, MAPPED_OVER, SENT, RAISED, EVENTS };
static const char *const event_names[] = {"poisoned", "broken memory", "another mapping", "mapped over ours", "kill", "raise"};

static char *other_mapping(void *at)
{
	int fd = memfd_create("cut", MFD_CLOEXEC);
	char *map = mmap(at, BLOCK, PROT_READ, MAP_SHARED | (at ? MAP_FIXED : 0), fd, 0); // an empty file: SIGBUS
	CHECK(fd >= 0 && map != MAP_FAILED);
	close(fd);
	return map;
}

// A fresh pager, a memory that works, and the address whose touch is a bus error (NULL: the signal is sent).
static volatile char *prepare(enum event event)
{
	pager = test_pager(1 << 30);
	struct uf_memory *m = create(event == POISONED ? "fail:1" : NULL);
	char *at = uf_memory_address(m);
	struct uf_memory *good = event == POISONED ? create("ok") : m;
	CHECK(test_differs((char *)uf_memory_address(good) + 5 * BLOCK, 5 * BLOCK, 3 * BLOCK) == UINT64_MAX);
	switch (event) {
	case BROKEN: { // as memory that the machine has lost: SIGBUS with BUS_MCEERR_AR on a block that is there
		struct uffdio_poison z = {{(uintptr_t)at + 6 * BLOCK, BLOCK}, 0, 0};
		CHECK(madvise(at + 6 * BLOCK, BLOCK, MADV_DONTNEED) == 0 && ioctl(m->uffd, UFFDIO_POISON, &z) == 0);
		return at + 6 * BLOCK;
	}
	case OTHER_MAPPING:
		return other_mapping(NULL);
	case MAPPED_OVER:
		return other_mapping(at + 6 * BLOCK);
	case POISONED:
		return at;
	default:
		return NULL;
	}
}

static void happen(enum event event, volatile char *at)
{
	if (event == SENT)
		kill(getpid(), SIGBUS);
	else if (event == RAISED)
		raise(SIGBUS);
	else
		(void)*at;
}

// --- who stands there before us

enum who { DEFAULT, IGNORED, EXITS, PASSES_ON, RAISES, WHO };
static const char *const who_names[] = {"the default", "ignored", "a handler", "a handler that calls us", "a handler that raises again"};
static volatile char *touched;
static struct sigaction passed_to;
static volatile sig_atomic_t calls;

static void exits(int number, siginfo_t *info, void *context)
{
	(void)context;
	sigset_t now;
	sigprocmask(SIG_SETMASK, NULL, &now);
	bool right = number == SIGBUS && !touched == (info->si_code <= 0) && (!touched || info->si_addr == touched) &&
		     sigismember(&now, SIGBUS) && sigismember(&now, SIGUSR1) && !sigismember(&now, SIGALRM);
	_exit(right ? 42 : 43);
}

// Installed after us and then put behind us, it has us as the one before it.
static void passes_on(int number, siginfo_t *info, void *context)
{
	if (calls++)
		_exit(44); // endless
	passed_to.sa_sigaction(number, info, context);
}

// As faulthandler does: puts back who was there before, and raises again.
static void raises(int number)
{
	if (calls++)
		_exit(44);
	sigaction(number, &passed_to, NULL);
	raise(number);
}

struct chained {
	enum event event;
	enum who who;
	int flags;
};

static void chained(void *arg)
{
	struct chained *c = arg;
	struct sigaction a = {.sa_handler = c->who == IGNORED ? SIG_IGN : SIG_DFL};
	if (c->who == EXITS)
		a = (struct sigaction){.sa_sigaction = exits, .sa_flags = SA_SIGINFO | c->flags};
	sigaddset(&a.sa_mask, SIGUSR1);
	CHECK(sigaction(SIGBUS, &a, NULL) == 0);
	alarm(30);
	touched = prepare(c->event);
	CHECK(uf_direct_armed());
	if (c->who >= PASSES_ON) {
		a = (struct sigaction){.sa_flags = c->flags};
		if (c->who == PASSES_ON) {
			a.sa_sigaction = passes_on;
			a.sa_flags |= SA_SIGINFO;
		} else {
			a.sa_handler = raises;
		}
		CHECK(sigaction(SIGBUS, &a, &passed_to) == 0 && !uf_direct_armed());
		CHECK(uf_direct_arm() == 0 && uf_direct_armed() && uf_direct_arm() == 0);
	}
	happen(c->event, touched);
	_exit(c->who == IGNORED && c->event >= SENT ? 42 : 45);
}

// Runs before this process has a pager: each case makes its own.
static void chains(void)
{
	for (enum event event = 0; event < EVENTS; event++) {
		if (event <= BROKEN && !uf_host_probe()->poison)
			continue;
		for (enum who who = 0; who < WHO; who++) {
			for (int nested = 0; nested <= (who >= PASSES_ON); nested++) {
				struct chained c = {event, who, nested ? SA_NODEFER : 0};
				int status = test_in_child(chained, &c);
				bool right = who == EXITS || (who == IGNORED && event >= SENT) ? status == 42 << 8 : (status & 0x7f) == SIGBUS;
				CHECK(right, "%s, %s%s: ended with %x", event_names[event], who_names[who], nested ? " (SA_NODEFER)" : "", status);
			}
		}
	}
}

// --- handlers that jump away

static sigjmp_buf out;

static void jumps(int number)
{
	siglongjmp(out, number);
}

// What a handler leaves by a jump must not be kept: references, staging areas, marks of who was called.
static void jumped_out_of(void *arg)
{
	(void)arg;
	pager = test_pager(1 << 30);
	struct uf_memory *m = create("fail:1");
	volatile char *at = uf_memory_address(m);
	for (volatile int i = 0; i < 100; i++) {
		int sig = sigsetjmp(out, 1);
		if (!sig) {
			(void)at[i % 4 * 65536];
			_exit(46);
		}
		CHECK(sig == test_poison_signal() && uf_direct_armed());
	}
	end(m, true);
	test_settle(pager);
	test_end(pager);
}

static volatile sig_atomic_t alarms;
static struct uf_memory *stormed;

static void waits_too(int number)
{
	(void)number;
	alarms++;
	(void)((volatile char *)uf_memory_address(stormed))[alarms * 5 % BLOCKS * BLOCK];
}

// A signal reaches a thread that waits for a source that hangs, and its handler may leave.
static void reached_while_waiting(void *arg)
{
	(void)arg;
	pager = test_pager(1 << 30);
	struct uf_memory *m = create("hang");
	volatile char *at = uf_memory_address(m);
	struct itimerval every = {{0, 30000}, {0, 30000}};
	signal(SIGALRM, jumps);
	setitimer(ITIMER_REAL, &every, NULL);
	for (volatile int i = 0; i < 2 * UF_DIRECT_STAGINGS; i++)
		if (!sigsetjmp(out, 1)) {
			(void)at[i * BLOCK];
			_exit(47);
		}
	every = (struct itimerval){0};
	setitimer(ITIMER_REAL, &every, NULL);
	CHECK(atomic_load(&pager->direct_used) == 0 && atomic_load(&m->waiters) == 0);
	end(m, true);
	test_settle(pager);
	test_end(pager);
}

// Timers fire during faults, and their handler faults itself, on blocks that other threads load.
static void stormer(struct test_crowd *c, int number)
{
	const uint8_t *at = uf_memory_address(stormed);
	for (uint64_t r = (uint64_t)number + 3; !atomic_load(&c->stop);) {
		uint64_t offset = test_random(&r) % LENGTH;
		CHECK(*(volatile const uint8_t *)(at + offset) == test_byte(offset));
		atomic_fetch_add(&c->work, 1);
	}
}

static void storm(void *arg)
{
	static struct test_crowd c;
	struct itimerval every = {{0, 300}, {0, 300}};
	struct sigaction a = {.sa_handler = waits_too, .sa_flags = SA_RESTART};
	pager = test_pager(1 << 30);
	stormed = create(arg);
	CHECK(sigaction(SIGALRM, &a, NULL) == 0);
	test_crowd_start(&c, 4, stormer, NULL);
	// Not this thread: a handler that faults in the middle of a call of the engine waits for what its own thread holds.
	sigset_t timer;
	sigemptyset(&timer);
	sigaddset(&timer, SIGALRM);
	CHECK(pthread_sigmask(SIG_BLOCK, &timer, NULL) == 0 && setitimer(ITIMER_REAL, &every, NULL) == 0);
	for (int i = 0; i < test_rounds(60); i++) {
		uf_memory_evict(stormed, 0, BLOCKS);
		test_crowd_work(&c, 300, "readers in a storm of signals");
	}
	test_crowd_stop(&c, "readers in a storm of signals");
	every = (struct itimerval){0};
	setitimer(ITIMER_REAL, &every, NULL);
	CHECK(alarms > 20);
	end(stormed, arg);
	test_settle(pager);
	test_end(pager);
}

// A thread that is cancelled while it waits in a fault ends after it, not in it.
static void *cancelled(void *arg)
{
	const volatile uint8_t *at = uf_memory_address(arg);
	for (uint64_t i = 0;; i = (i + 1) % BLOCKS) {
		CHECK(at[i * BLOCK] == test_byte(i * BLOCK));
		pthread_testcancel();
	}
	return NULL;
}

static void cancels(void *arg)
{
	pager = test_pager(1 << 30);
	struct uf_memory *m = create(arg);
	const uint8_t *at = uf_memory_address(m);
	for (int i = 0; i < test_rounds(40); i++) {
		pthread_t t;
		void *how;
		CHECK(pthread_create(&t, NULL, cancelled, m) == 0);
		usleep((useconds_t)(i % 7) * 300);
		CHECK(pthread_cancel(t) == 0 && pthread_join(t, &how) == 0 && how == PTHREAD_CANCELED);
		CHECK(atomic_load(&pager->direct_used) == 0 && atomic_load(&m->waiters) == 0);
		uf_memory_evict(m, 0, BLOCKS);
	}
	CHECK(test_differs(at, 0, LENGTH) == UINT64_MAX);
	end(m, true);
	test_settle(pager);
	test_end(pager);
}

// An alternate stack as small as faulthandler's. The handler evicts and reports there, and stays within it.
static void small_stack(void *arg)
{
	(void)arg;
	const size_t size = 12 << 10, guard = 4096;
	char *area = mmap(NULL, guard + size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	stack_t s = {.ss_sp = area + guard, .ss_size = size};
	CHECK(area != MAP_FAILED && mprotect(area, guard, PROT_NONE) == 0 && sigaltstack(&s, NULL) == 0);
	pager = test_pager(64 * BLOCK);
	struct uf_memory *m = create(NULL);
	CHECK(test_differs(uf_memory_address(m), 0, LENGTH) == UINT64_MAX);
	CHECK(test_stats(m).evictions > 0);
	volatile char *at = uf_memory_address(m);
	test_log_begin();
	if (!sigsetjmp(out, 1))
		at[5 * BLOCK] = 1; // refused, with a line
	free(test_log_end());
	end(m, false);
	test_settle(pager);
	test_end(pager);
}

int main(int argc, char **argv)
{
	test_start(argc, argv);
	test_needs_userfaultfd();
	if (!(uf_host_probe()->features & UFFD_FEATURE_SIGBUS)) {
		printf("no UFFD_FEATURE_SIGBUS here\n");
		return 77;
	}
	test_reference(LENGTH);
	const char *only = argc == 2 ? argv[1] : NULL;
	static const struct {
		const char *name;
		void (*run)(void *);
		char *arg;
	} parts[] = {{"jumped_out_of", jumped_out_of, NULL}, {"reached_while_waiting", reached_while_waiting, NULL},
		     {"storm", storm, NULL}, {"storm_worker", storm, "slow:200"}, {"cancels", cancels, "slow:300"}, {"small_stack", small_stack, NULL}};
	if (RUN("chains"))
		chains();
	signal(SIGBUS, jumps);
	signal(SIGSEGV, jumps);
	for (unsigned i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
		// Sanitizers have larger frames, and ThreadSanitizer runs handlers with all signals blocked: there a fault kills.
		if ((parts[i].run == small_stack && TEST_TSAN + TEST_ASAN) || (parts[i].run == storm && TEST_TSAN))
			continue;
		if (!RUN(parts[i].name))
			continue;
		int status = test_in_child(parts[i].run, parts[i].arg);
		CHECK(status == 0, "%s ended with %x", parts[i].name, status);
	}
	return 0;
}
