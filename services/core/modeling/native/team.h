/* Threads that help with one job at a time.
 *
 * A job is a row of phases, a phase a number of tasks that may run in any order. Whoever takes part claims
 * tasks from a counter, so a helper that comes late or never is not waited for, only a task that it holds.
 *
 * A team belongs to the thread whose jobs it does: several threads have a team each, helpers run at the niceness
 * that their thread has at the job, and they end with it. After a fork the child's thread gets a new one. Nobody
 * spins for longer than a sleep costs.
 */
#ifndef SF_TEAM_H
#define SF_TEAM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

enum { MOST_MEMBERS = 64, MOST_PHASES = 256, SPINS = 4000, TOKENS_PER_MEMBER = 24 };

struct job {
    int phases;
    long (*tasks)(const void *context, int phase);
    void (*run)(const void *context, int phase, long task, int member);
    const void *context;
    atomic_long claimed[MOST_PHASES], finished[MOST_PHASES];
};

struct helper {
    struct team *team;
    int member;
    pthread_t thread;
    pthread_cond_t called;
};

struct team {
    pid_t process;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a phase is over, or nobody helps any more */
    struct job *job;        /* what helpers may join, or null */
    unsigned long calls;    /* so that a helper joins each job once */
    int wanted, nice;       /* members wanted besides the caller, and the caller's niceness */
    int threads, ending;
    atomic_long helping, sleepers;
    struct helper helper[MOST_MEMBERS]; /* of member i at i; none at 0, the caller */
};

static pthread_key_t TEAM;
static pthread_once_t TEAM_ONCE = PTHREAD_ONCE_INIT;
static int TEAM_REFUSED;

/* Leave the core to whoever shares it, for about as long as it takes another core to see a store. */
static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` does nothing on most cores */
#elif defined(__arm__)
    __asm__ volatile("yield" ::: "memory");
#endif
}

static void tell_change(struct team *team) {
    if (!team || !atomic_load(&team->sleepers)) return;
    pthread_mutex_lock(&team->lock);
    pthread_cond_broadcast(&team->changed);
    pthread_mutex_unlock(&team->lock);
}

/* Whoever brings the counter to `value` must tell_change. */
static void wait_until(struct team *team, atomic_long *counter, long value) {
    for (int spins = 0; spins < SPINS; ++spins) {
        if (atomic_load(counter) == value) return;
        relax();
    }
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(counter) != value) pthread_cond_wait(&team->changed, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
}

static void take_part(struct team *team, struct job *job, int member) {
    for (int phase = 0; phase < job->phases; ++phase) {
        const long tasks = job->tasks(job->context, phase);
        for (long task; (task = atomic_fetch_add(&job->claimed[phase], 1)) < tasks;) {
            job->run(job->context, phase, task, member);
            if (atomic_fetch_add(&job->finished[phase], 1) + 1 == tasks) tell_change(team);
        }
        if (atomic_load(&job->finished[phase]) != tasks) wait_until(team, &job->finished[phase], tasks);
    }
}

static void *help(void *argument) {
    struct helper *me = argument;
    struct team *team = me->team;
    unsigned long seen = 0;
    int nice = getpriority(PRIO_PROCESS, 0); /* on Linux this and setpriority mean the calling thread */
    pthread_mutex_lock(&team->lock);
    while (!team->ending) {
        if (!team->job || team->calls == seen || me->member > team->wanted) {
            pthread_cond_wait(&me->called, &team->lock);
            continue;
        }
        struct job *job = team->job;
        const int wanted_nice = team->nice;
        seen = team->calls;
        atomic_fetch_add(&team->helping, 1);
        pthread_mutex_unlock(&team->lock);
        if (nice != wanted_nice && !setpriority(PRIO_PROCESS, 0, wanted_nice)) nice = wanted_nice;
        take_part(team, job, me->member);
        if (atomic_fetch_sub(&team->helping, 1) == 1) tell_change(team);
        pthread_mutex_lock(&team->lock);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

/* The calling thread ends: so do its helpers. Those of a forked thread are not in this process. */
static void end_team(void *argument) {
    struct team *team = argument;
    if (team->process == getpid()) {
        pthread_mutex_lock(&team->lock);
        team->ending = 1;
        for (int member = 1; member <= team->threads; ++member) pthread_cond_signal(&team->helper[member].called);
        pthread_mutex_unlock(&team->lock);
        for (int member = 1; member <= team->threads; ++member) pthread_join(team->helper[member].thread, NULL);
    }
    free(team);
}

static void make_team_key(void) { TEAM_REFUSED = pthread_key_create(&TEAM, end_team); }

/* The calling thread's team, or null when the system has no room for one. */
static struct team *own_team(void) {
    pthread_once(&TEAM_ONCE, make_team_key);
    if (TEAM_REFUSED) return NULL;
    struct team *team = pthread_getspecific(TEAM);
    if (team && team->process == getpid()) return team;
    free(team);
    team = calloc(1, sizeof *team);
    if (team) {
        team->process = getpid();
        pthread_mutex_init(&team->lock, NULL);
        pthread_cond_init(&team->changed, NULL);
    }
    if (pthread_setspecific(TEAM, team)) {
        free(team);
        return NULL;
    }
    return team;
}

/* Fewer help where the system gives no more threads. */
static void call_helpers(struct team *team, struct job *job, int wanted) {
    pthread_mutex_lock(&team->lock);
    while (team->threads < wanted) {
        const int member = team->threads + 1;
        struct helper *helper = &team->helper[member];
        helper->team = team;
        helper->member = member;
        pthread_cond_init(&helper->called, NULL);
        if (pthread_create(&helper->thread, NULL, help, helper)) break;
        team->threads = member;
    }
    team->job = job;
    team->wanted = wanted = wanted < team->threads ? wanted : team->threads;
    team->nice = getpriority(PRIO_PROCESS, 0);
    ++team->calls;
    pthread_mutex_unlock(&team->lock);
    for (int member = 1; member <= wanted; ++member) pthread_cond_signal(&team->helper[member].called);
}

static void dismiss_helpers(struct team *team) {
    pthread_mutex_lock(&team->lock);
    team->job = NULL;
    pthread_mutex_unlock(&team->lock);
    wait_until(team, &team->helping, 0);
}

/* Members worth calling for so many tokens: to wake one costs about as long as it takes to do 10 of them. */
static int members_for(long tokens, int members) {
    const long useful = tokens / TOKENS_PER_MEMBER;
    return useful < members ? (useful < 1 ? 1 : (int)useful) : members;
}

/* Rows of a task, `most` at most: few enough for every member to have work, many enough not to fetch the weights
 * too often. */
static long fair_rows(long tokens, int members, long most) {
    if (members < 2) return most;
    const long fair = (tokens + members - 1) / members, half = (tokens + 2 * members - 1) / (2 * members);
    const long least = fair < 16 ? fair : 16;
    return half > most ? most : half < least ? least : half;
}

/* Do the job with up to `members` threads, the caller being member 0. */
static void work(struct job *job, int members) {
    for (int phase = 0; phase < job->phases; ++phase) {
        atomic_init(&job->claimed[phase], 0);
        atomic_init(&job->finished[phase], 0);
    }
    if (members > MOST_MEMBERS) members = MOST_MEMBERS;
    struct team *team = members < 2 ? NULL : own_team();
    if (!team) {
        take_part(NULL, job, 0);
        return;
    }
    call_helpers(team, job, members - 1);
    take_part(team, job, 0);
    dismiss_helpers(team);
}

#endif
