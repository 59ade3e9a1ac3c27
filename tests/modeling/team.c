/* What `native/team.h` promises, as cases by name; each prints a line when it holds and waits for ever, or prints
 * something else, when it does not. Run by test_team.py. */
#define _GNU_SOURCE
#include "services/core/modeling/native/team.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

enum { MEMBERS = 4, CALLERS = 4 };

static void rest(void) { nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL); }

/* A job whose tasks end when `company` members of all jobs of the meeting are at it. */
struct meeting {
    atomic_int present;
    int company;
};

struct gathering {
    struct meeting *meeting;
    int members;
    atomic_int nice[MOST_MEMBERS];
};

static long one_each(const void *context, int phase) {
    (void)phase;
    return ((const struct gathering *)context)->members;
}

static void meet(const void *context, int phase, long task, int member) {
    struct gathering *g = (struct gathering *)context;
    (void)phase, (void)task;
    atomic_store(&g->nice[member], getpriority(PRIO_PROCESS, 0));
    atomic_fetch_add(&g->meeting->present, 1);
    while (atomic_load(&g->meeting->present) < g->meeting->company) rest();
}

static void *gather(void *context) {
    struct gathering *g = context;
    struct job job = {.phases = 1, .tasks = one_each, .run = meet, .context = g};
    work(&job, g->members);
    return NULL;
}

static int usual; /* niceness of the process */

/* Niceness over the process's own of each member of a job that the calling thread does. */
static void gather_alone(int members, const char *who) {
    struct meeting meeting = {.company = members};
    struct gathering g = {.meeting = &meeting, .members = members};
    gather(&g);
    printf("%s", who);
    for (int i = 0; i < members; ++i) printf(" %+d", atomic_load(&g.nice[i]) - usual);
    printf("\n");
}

static void *of_the_background(void *argument) {
    (void)argument;
    gather_alone(MEMBERS, "usual");
    setpriority(PRIO_PROCESS, 0, usual + 5);
    gather_alone(MEMBERS, "later");
    return NULL;
}

static void in_a_thread(void *(*run)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, argument)) abort();
    pthread_join(thread, NULL);
}

static void niceness(void) {
    in_a_thread(of_the_background, NULL);
    gather_alone(MEMBERS, "another");
}

static void together(void) {
    struct meeting meeting = {.company = CALLERS * MEMBERS};
    struct gathering g[CALLERS];
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; ++i) {
        g[i] = (struct gathering){.meeting = &meeting, .members = MEMBERS};
        if (pthread_create(&threads[i], NULL, gather, &g[i])) abort();
    }
    for (int i = 0; i < CALLERS; ++i) pthread_join(threads[i], NULL);
    printf("present %d\n", atomic_load(&meeting.present));
}

/* The child's thread forks again, and the grandchild has a team as well; one of the parent's other threads is in
 * the middle of a job at the fork. */
static void forked(void) {
    struct meeting meeting = {.company = MEMBERS + 1};
    struct gathering busy = {.meeting = &meeting, .members = MEMBERS};
    pthread_t thread;
    gather_alone(MEMBERS, "parent");
    if (pthread_create(&thread, NULL, gather, &busy)) abort();
    while (atomic_load(&meeting.present) < MEMBERS) rest();
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        gather_alone(MEMBERS, "child");
        fflush(stdout);
        if ((child = fork()) == 0) {
            gather_alone(MEMBERS, "grandchild");
            fflush(stdout);
            _exit(0);
        }
        waitpid(child, NULL, 0);
        gather_alone(MEMBERS, "child");
        fflush(stdout);
        _exit(0);
    }
    waitpid(child, NULL, 0);
    atomic_fetch_add(&meeting.present, 1);
    pthread_join(thread, NULL);
    gather_alone(MEMBERS, "parent");
}

static int threads_here(void) {
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *entry; (entry = readdir(tasks));) count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

static void *gather_few_and_many(void *argument) {
    (void)argument;
    gather_alone(2, "few");
    gather_alone(MOST_MEMBERS, "many");
    gather_alone(3, "few");
    printf("threads %d\n", threads_here());
    return NULL;
}

/* Helpers are there while their thread is, and gone behind it. */
static void lifetime(void) {
    in_a_thread(gather_few_and_many, NULL);
    while (threads_here() > 1) rest();
    printf("threads 1\n");
}

/* Every task once, no phase before the one in front of it is over, however many jobs run at once. */
enum { STRESS_PHASES = 30, STRESS_TASKS = 9 };

struct counting {
    atomic_int done[STRESS_PHASES][STRESS_TASKS], wrong;
    unsigned long sum; /* not atomic: a phase of one task writes what the next reads */
};

static long counted_tasks(const void *context, int phase) {
    (void)context;
    return phase % 2 ? 1 : STRESS_TASKS;
}

static void count(const void *context, int phase, long task, int member) {
    struct counting *c = (struct counting *)context;
    (void)member;
    if (atomic_fetch_add(&c->done[phase][task], 1)) atomic_fetch_add(&c->wrong, 1);
    for (long before = 0; phase && before < counted_tasks(context, phase - 1); ++before)
        if (atomic_load(&c->done[phase - 1][before]) != 1) atomic_fetch_add(&c->wrong, 1);
    if (phase % 2)
        c->sum = c->sum * 31 + (unsigned long)phase;
    else if (phase && !c->sum)
        atomic_fetch_add(&c->wrong, 1);
}

static void *count_often(void *argument) {
    atomic_int *wrong = argument;
    for (int round = 0; round < 200; ++round) {
        struct counting c;
        memset(&c, 0, sizeof c);
        struct job job = {.phases = STRESS_PHASES, .tasks = counted_tasks, .run = count, .context = &c};
        work(&job, 1 + round % 5);
        for (int phase = 0; phase < STRESS_PHASES; ++phase)
            for (long task = 0; task < counted_tasks(&c, phase); ++task)
                if (atomic_load(&c.done[phase][task]) != 1) atomic_fetch_add(wrong, 1);
        atomic_fetch_add(wrong, atomic_load(&c.wrong));
    }
    return NULL;
}

static void stress(void) {
    atomic_int wrong = 0;
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; ++i)
        if (pthread_create(&threads[i], NULL, count_often, &wrong)) abort();
    for (int i = 0; i < CALLERS; ++i) pthread_join(threads[i], NULL);
    printf("wrong %d\n", atomic_load(&wrong));
}

/* The last task is a long one: who waits for it sleeps. Prints the CPU time of it in its tenths. */
static long one_slow_task(const void *context, int phase) {
    (void)context;
    return phase == 0 ? MEMBERS : 1;
}

static void sleep_in_the_last(const void *context, int phase, long task, int member) {
    if (phase == 0) meet(context, phase, task, member);
    if (phase == 1) nanosleep(&(struct timespec){.tv_nsec = 500000000}, NULL);
}

static void waiting(void) {
    struct meeting meeting = {.company = MEMBERS};
    struct gathering g = {.meeting = &meeting, .members = MEMBERS};
    struct job job = {.phases = 3, .tasks = one_slow_task, .run = sleep_in_the_last, .context = &g};
    struct timespec from, to;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &from);
    work(&job, MEMBERS);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &to);
    const double seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
    printf("tenths %d\n", (int)(seconds / 0.05));
}

int main(int count_of_arguments, char **arguments) {
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
        {"niceness", niceness}, {"together", together}, {"forked", forked},
        {"lifetime", lifetime}, {"stress", stress},     {"waiting", waiting},
    };
    usual = getpriority(PRIO_PROCESS, 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; ++i)
        if (count_of_arguments == 2 && !strcmp(arguments[1], cases[i].name)) {
            cases[i].run();
            return 0;
        }
    return 2;
}
