/* Runs a Python program in a process that a fork server makes, as if it were run here:
 *
 *     launch SOCKET PROGRAM [ARGUMENTS]
 *
 * The server (server.py) gets the arguments, the environment, the working directory and the three
 * standard streams.  Signals are handed on; the end of the program is the end of this one, with its
 * exit code or by its signal.
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

extern char **environ;
static volatile sig_atomic_t child = 0;

static void hand_on(int number) {
  if (child > 0) kill(child, number);
}

static void fail(const char *what) {
  perror(what);
  _exit(125);
}

static char *put(char *end, const char *text) {
  size_t length = strlen(text) + 1;
  memcpy(end, text, length);
  return end + length;
}

/* Reads 4 bytes; returns 0 where the server has gone. */
static int read_number(int place, int32_t *number) {
  char *end = (char *)number;
  for (size_t had = 0; had < sizeof *number;) {
    ssize_t count = read(place, end + had, sizeof *number - had);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return 0;
    had += (size_t)count;
  }
  return 1;
}

int main(int argc, char **argv) {
  if (argc < 3) return 125;
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(argv[1]) >= sizeof address.sun_path) fail("a path that is too long for a socket");
  strcpy(address.sun_path, argv[1]);
  int place = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (place < 0 || connect(place, (struct sockaddr *)&address, sizeof address)) fail(argv[1]);

  /* The length of the rest, the number of arguments, these, the directory, the environment. */
  size_t size = 1 << 16;
  for (int i = 2; i < argc; i++) size += strlen(argv[i]) + 1;
  for (char **entry = environ; *entry; entry++) size += strlen(*entry) + 1;
  char *message = malloc(size), *end = message + sizeof(uint32_t);
  if (!message) fail("malloc");
  uint32_t count = (uint32_t)(argc - 2);
  memcpy(end, &count, sizeof count);
  end += sizeof count;
  for (int i = 2; i < argc; i++) end = put(end, argv[i]);
  if (!getcwd(end, 4096)) fail("getcwd");
  end += strlen(end) + 1;
  for (char **entry = environ; *entry; entry++) end = put(end, *entry);
  uint32_t length = (uint32_t)(end - message - sizeof length);
  memcpy(message, &length, sizeof length);

  /* Whatever comes before the process is there is handed on when it is. */
  sigset_t all, before;
  sigemptyset(&all);
  const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) sigaddset(&all, numbers[i]);
  sigprocmask(SIG_BLOCK, &all, &before);

  int streams[3] = {0, 1, 2};
  char control[CMSG_SPACE(sizeof streams)] = {0};
  struct iovec part = {message, (size_t)(end - message)};
  struct msghdr header = {
      .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof streams);
  memcpy(CMSG_DATA(rights), streams, sizeof streams);
  ssize_t sent = sendmsg(place, &header, 0);
  if (sent < 0) fail("sendmsg");
  for (char *rest = message + sent; rest < end; rest += sent)
    if ((sent = write(place, rest, (size_t)(end - rest))) < 0) fail("write");

  int32_t number, status;
  if (!read_number(place, &number)) fail("the fork server does not answer");
  child = number;
  struct sigaction action = {.sa_handler = hand_on};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
    sigaction(numbers[i], &action, NULL);
  sigprocmask(SIG_SETMASK, &before, NULL);
  /* The streams are the program's alone: whoever reads them sees their end when it ends. */
  for (int i = 0; i < 3; i++) close(i);
  if (!read_number(place, &status)) return 125;
  if (status >= 0) return status;
  signal(-status, SIG_DFL);
  raise(-status);
  return 128 - status;
}
