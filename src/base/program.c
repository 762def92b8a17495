/*-------------------------------------------------------------------------
 * program.c
 *		Run a program and take what it prints.
 *
 * No shell. The program gets its arguments, an empty standard input, a short environment and
 * no descriptor of the server's; it leads a session of its own, which is killed when we are
 * interrupted, when it takes too long or when we die. It is waited for in every case.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/program.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/secret.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

/* How often to look whether a program that has closed its output has ended. */
#define END_POLL_MS 10

/* Exit status for "could not be executed", as shells have it. */
#define EXIT_NOT_EXECUTED 127

typedef struct Program
{
	pid_t		pid;			/* 0 when it has been waited for */
	int			output;			/* the pipe's end; -1 when closed */
	int			status;
	TimestampTz deadline;
} Program;

/* The child's part. Only async-signal-safe calls: other threads may have held any lock. */
static void
become_program(char *const *arguments, int output)
{
	static char *const environment[] = {
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", NULL
	};
	struct rlimit no_core = {0, 0};
	struct sigaction by_default = {.sa_handler = SIG_DFL};
	sigset_t	none;
	int			nothing = open("/dev/null", O_RDWR);

	(void) setsid();
	(void) prctl(PR_SET_PDEATHSIG, SIGKILL);
	(void) setrlimit(RLIMIT_CORE, &no_core);
	for (int number = 1; number < NSIG; number++)
		(void) sigaction(number, &by_default, NULL);
	if (nothing < 0 || dup2(nothing, STDIN_FILENO) < 0 || dup2(output, STDOUT_FILENO) < 0 || dup2(nothing, STDERR_FILENO) < 0)
		_exit(EXIT_NOT_EXECUTED);
	if (syscall(SYS_close_range, STDERR_FILENO + 1, ~0U, 0) != 0)
		for (int fd = (int) sysconf(_SC_OPEN_MAX) - 1; fd > STDERR_FILENO; fd--)
			(void) close(fd);
	sigemptyset(&none);
	(void) sigprocmask(SIG_SETMASK, &none, NULL);
	(void) execve(arguments[0], arguments, environment);
	_exit(EXIT_NOT_EXECUTED);
}

/* Start the program; false, with errno set, when there is no process or pipe to be had. */
static bool
start(Program *program, char *const *arguments)
{
	int			ends[2];
	sigset_t	before;

	if (pipe2(ends, O_CLOEXEC) != 0)
		return false;
	/* A signal to the child must not run our handlers, which share our latch. */
	sigprocmask(SIG_SETMASK, &BlockSig, &before);
	program->pid = fork();
	if (program->pid == 0)
		become_program(arguments, ends[1]);
	sigprocmask(SIG_SETMASK, &before, NULL);
	close(ends[1]);
	program->output = ends[0];
	if (program->pid > 0)
	{
		(void) fcntl(program->output, F_SETFL, O_NONBLOCK);
		return true;
	}
	program->pid = 0;
	close(program->output);
	program->output = -1;
	return false;
}

/* Kill the program, and its children with it, if it has not ended, and leave no zombie. */
static void
finish(int code, Datum arg)
{
	Program    *program = (Program *) DatumGetPointer(arg);

	if (program->output >= 0)
		close(program->output);
	program->output = -1;
	if (program->pid == 0)
		return;
	/* The session may not have been made yet. */
	(void) kill(-program->pid, SIGKILL);
	(void) kill(program->pid, SIGKILL);
	while (waitpid(program->pid, &program->status, 0) < 0 && errno == EINTR)
		;
	program->pid = 0;
}

/* Wait for output, or for a moment when there is no more; false when the time is over. */
static bool
wait_for(Program *program)
{
	long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), program->deadline);
	int			events = WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH;

	if (left <= 0)
		return false;
	if (program->output >= 0)
		(void) WaitLatchOrSocket(MyLatch, events | WL_SOCKET_READABLE, program->output, left, PG_WAIT_EXTENSION);
	else
		(void) WaitLatch(MyLatch, events, Min(left, END_POLL_MS), PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	return true;
}

/* Read to the end of the output and wait for the program's end; NULL, or the reason why not. */
static const char *
collect(Program *program, char *text, Size size_max)
{
	Size		length = 0;

	for (;;)
	{
		ssize_t		n;

		if (program->output >= 0)
		{
			/* One byte more than allowed tells that there is more. */
			n = read(program->output, text + length, size_max + 1 - length);
			if (n > 0)
				length += n;
			if (length > size_max)
				return psprintf("printed more than %zu bytes", size_max);
			if (n > 0)
				continue;
			if (n == 0 || (errno != EAGAIN && errno != EINTR))
			{
				close(program->output);
				program->output = -1;
			}
		}
		if (program->output < 0 && waitpid(program->pid, &program->status, WNOHANG) == program->pid)
		{
			program->pid = 0;
			text[length] = '\0';
			return NULL;
		}
		if (!wait_for(program))
			return "did not end in time (keyvault.master_key_timeout)";
	}
}

static const char *
judge(int status)
{
	if (WIFSIGNALED(status))
		return psprintf("was ended by signal %d", WTERMSIG(status));
	if (WEXITSTATUS(status) == EXIT_NOT_EXECUTED)
		return "could not be executed: it exited with status 127";
	if (WEXITSTATUS(status) != 0)
		return psprintf("exited with status %d", WEXITSTATUS(status));
	return NULL;
}

/*
 * Run a program, by its absolute path, and return what it prints, NUL-terminated, in secret
 * memory of the current context; NULL, with a reason that goes on from "the command ...",
 * when it fails, takes longer than timeout_ms or prints more than size_max bytes. What it
 * prints to its standard error is dropped.
 */
char *
kv_program_run(char *const *arguments, Size size_max, int timeout_ms, const char **reason)
{
	Program		program = {.output = -1};
	char	   *text;

	if (access(arguments[0], X_OK) != 0)
	{
		*reason = psprintf("could not be executed: %s", strerror(errno));
		return NULL;
	}
	text = kv_secret_alloc(size_max + 2);
	program.deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), timeout_ms);
	PG_ENSURE_ERROR_CLEANUP(finish, PointerGetDatum(&program));
	{
		if (start(&program, arguments))
			*reason = collect(&program, text, size_max);
		else
			*reason = psprintf("could not be started: %s", strerror(errno));
	}
	PG_END_ENSURE_ERROR_CLEANUP(finish, PointerGetDatum(&program));
	finish(0, PointerGetDatum(&program));
	if (*reason == NULL)
		*reason = judge(program.status);
	return *reason ? NULL : text;
}
