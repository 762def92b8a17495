/*-------------------------------------------------------------------------
 * transfer.c
 *		Many HTTP calls at once, behind one file descriptor.
 *
 * libcurl's multi interface watches its sockets through an epoll set of our own, which
 * the worker waits for together with its latch. Callbacks never throw: they set state,
 * and memory they need comes from malloc. While libcurl runs, signals are blocked, so
 * that threads of its resolver inherit the blocked mask and never run our handlers.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/transfer.h"

#include <sys/epoll.h>
#include <unistd.h>

#include <curl/curl.h>

#include "base/error.h"
#include "base/https.h"
#include "base/secret.h"
#include "base/settings.h"
#include "gateway/private_address.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "portability/instr_time.h"

#define EVENTS_AT_ONCE 64

/* What a Vault server answers for a key is small. */
#define OWN_ANSWER_MAX (64 * 1024)

struct KvTransferPool
{
	CURLM	   *multi;
	int			epoll_fd;
	bool		timer_set;
	instr_time	timer_start;
	long		timer_ms;
};

struct KvTransfer
{
	CURL	   *easy;
	void	   *owner;
	struct curl_slist *headers;
	char	   *request_body;
	char	   *body;
	Size		length;
	Size		allocated;
	Size		size_max;
	bool		allow_private;
	bool		address_refused;
	bool		too_large;
	bool		out_of_memory;
	char		error[CURL_ERROR_SIZE];
};

/* libcurl tells which sockets it waits for. */
static int
watch_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *known)
{
	KvTransferPool *pool = arg;
	struct epoll_event event = {.data.fd = fd};

	if (what == CURL_POLL_REMOVE)
	{
		(void) epoll_ctl(pool->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		return 0;
	}
	if (what & CURL_POLL_IN)
		event.events |= EPOLLIN;
	if (what & CURL_POLL_OUT)
		event.events |= EPOLLOUT;
	if (epoll_ctl(pool->epoll_fd, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0)
		(void) epoll_ctl(pool->epoll_fd, known ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event);
	(void) curl_multi_assign(pool->multi, fd, pool);
	return 0;
}

/* libcurl tells when it wants to be called without an event. */
static int
set_timer(CURLM *multi, long timeout_ms, void *arg)
{
	KvTransferPool *pool = arg;

	pool->timer_set = timeout_ms >= 0;
	pool->timer_ms = timeout_ms;
	INSTR_TIME_SET_CURRENT(pool->timer_start);
	return 0;
}

/* The last word on an address: after the resolver, so that a name cannot turn inwards. */
static curl_socket_t
open_socket(void *arg, curlsocktype purpose, struct curl_sockaddr *address)
{
	KvTransfer *transfer = arg;

	if (!transfer->allow_private && kv_private_address(&address->addr))
	{
		transfer->address_refused = true;
		return CURL_SOCKET_BAD;
	}
	return socket(address->family, address->socktype | SOCK_CLOEXEC, address->protocol);
}

/* Forget an answer, or the part of one: it may be a key, or repeat the one that it was asked for with. */
static void
free_body(KvTransfer *transfer)
{
	if (transfer->body)
		kv_secret_wipe(transfer->body, transfer->length);
	free(transfer->body);
}

/* Make room for so many bytes of an answer; false without memory. */
static bool
grow_body(KvTransfer *transfer, Size wanted)
{
	Size		allocated = Max(transfer->allocated * 2, wanted);
	char	   *larger = malloc(allocated);

	if (larger == NULL)
		return false;
	if (transfer->body)
		memcpy(larger, transfer->body, transfer->length);
	free_body(transfer);
	transfer->body = larger;
	transfer->allocated = allocated;
	return true;
}

/* Take decoded bytes, up to the limit. */
static size_t
take_body(char *bytes, size_t size, size_t count, void *arg)
{
	KvTransfer *transfer = arg;
	Size		length = size * count;

	if (length > transfer->size_max - transfer->length)
	{
		transfer->too_large = true;
		return 0;
	}
	if (transfer->length + length + 1 > transfer->allocated && !grow_body(transfer, transfer->length + length + 1))
	{
		transfer->out_of_memory = true;
		return 0;
	}
	memcpy(transfer->body + transfer->length, bytes, length);
	transfer->length += length;
	/* From 8.8 on libcurl keeps its buffer for the transfers that follow. */
	kv_secret_wipe(bytes, length);
	return length;
}

/* Make the pool. Once per process, not before it has forked. */
KvTransferPool *
kv_transfer_pool_create(void)
{
	KvTransferPool *pool = palloc0(sizeof(KvTransferPool));

	if (!kv_https_initialize() ||
		(pool->multi = curl_multi_init()) == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY), errmsg("could not initialize libcurl")));
	pool->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (pool->epoll_fd < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not create an epoll set: %m")));
	curl_multi_setopt(pool->multi, CURLMOPT_SOCKETFUNCTION, watch_socket);
	curl_multi_setopt(pool->multi, CURLMOPT_SOCKETDATA, pool);
	curl_multi_setopt(pool->multi, CURLMOPT_TIMERFUNCTION, set_timer);
	curl_multi_setopt(pool->multi, CURLMOPT_TIMERDATA, pool);
	return pool;
}

/* Limit connections to one host and in all, idle ones included. */
void
kv_transfer_pool_configure(KvTransferPool *pool, int host_connections, int connections)
{
	curl_multi_setopt(pool->multi, CURLMOPT_MAX_HOST_CONNECTIONS, (long) host_connections);
	curl_multi_setopt(pool->multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, (long) connections);
	curl_multi_setopt(pool->multi, CURLMOPT_MAXCONNECTS, (long) connections);
#if CURL_AT_LEAST_VERSION(8, 20, 0)
	/* Or lookups that hang hold up those of other calls. */
	curl_multi_setopt(pool->multi, CURLMOPT_RESOLVE_THREADS_MAX, (long) connections);
#endif
}

/* Readable when kv_transfer_pool_advance has something to do. */
int
kv_transfer_pool_fd(KvTransferPool *pool)
{
	return pool->epoll_fd;
}

/* Milliseconds until kv_transfer_pool_advance wants to be called anyway; -1 for never. */
long
kv_transfer_pool_timeout(KvTransferPool *pool)
{
	instr_time	elapsed;
	double		left;

	if (!pool->timer_set)
		return -1;
	INSTR_TIME_SET_CURRENT(elapsed);
	INSTR_TIME_SUBTRACT(elapsed, pool->timer_start);
	left = pool->timer_ms - INSTR_TIME_GET_MILLISEC(elapsed);
	return left <= 0 ? 0 : (long) left + 1;
}

/* Let libcurl do what it can without waiting. */
void
kv_transfer_pool_advance(KvTransferPool *pool)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	int			running;
	int			n;

	sigprocmask(SIG_SETMASK, &BlockSig, NULL);
	n = epoll_wait(pool->epoll_fd, events, EVENTS_AT_ONCE, 0);
	for (int i = 0; i < n; i++)
	{
		int			mask = 0;

		if (events[i].events & EPOLLIN)
			mask |= CURL_CSELECT_IN;
		if (events[i].events & EPOLLOUT)
			mask |= CURL_CSELECT_OUT;
		if (events[i].events & (EPOLLERR | EPOLLHUP))
			mask |= CURL_CSELECT_ERR;
		curl_multi_socket_action(pool->multi, events[i].data.fd, mask, &running);
	}
	if (kv_transfer_pool_timeout(pool) == 0)
	{
		pool->timer_set = false;
		curl_multi_socket_action(pool->multi, CURL_SOCKET_TIMEOUT, 0, &running);
	}
	sigprocmask(SIG_SETMASK, &UnBlockSig, NULL);
}

/* Is the URL's host the one that an administrator excepted? Written as host or host:port. */
static bool
host_is_allowed(CURLU *url, const char *allowed_host)
{
	char	   *host = NULL;
	char	   *port = NULL;
	bool		allowed = false;

	if (allowed_host == NULL || *allowed_host == '\0')
		return false;
	if (curl_url_get(url, CURLUPART_HOST, &host, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_PORT, &port, CURLU_DEFAULT_PORT) == CURLUE_OK)
	{
		Size		length = strlen(host);

		allowed = pg_strncasecmp(allowed_host, host, length) == 0 &&
			(allowed_host[length] == '\0' ||
			 (allowed_host[length] == ':' && strcmp(allowed_host + length + 1, port) == 0));
	}
	curl_free(host);
	curl_free(port);
	return allowed;
}

/* Decide what the URL may do; false, with a reason, when it may not be called at all. */
static bool
check_url(const KvTransferRequest *request, bool *allowed, char *error, Size error_size)
{
	CURLU	   *url = curl_url();
	char	   *scheme = NULL;
	char	   *host = NULL;
	bool		usable;

	*allowed = false;
	usable = url != NULL && curl_url_set(url, CURLUPART_URL, request->url, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK;
	if (!usable)
		snprintf(error, error_size, "the provider's base_url and the path do not make a URL");
	else
	{
		*allowed = request->is_own_server || host_is_allowed(url, request->allowed_host);
		usable = *allowed || strcmp(scheme, "https") == 0;
		if (!usable)
			snprintf(error, error_size, "plain http is only for a host that providers.allowed_host names");
		if (request->is_own_server && strcmp(scheme, "https") != 0 &&
			(curl_url_get(url, CURLUPART_HOST, &host, 0) != CURLUE_OK || !kv_https_host_is_loopback(host)))
		{
			usable = false;
			snprintf(error, error_size, "plain http is for a loopback address only");
		}
	}
	curl_free(scheme);
	curl_free(host);
	curl_url_cleanup(url);
	return usable;
}

static void
free_transfer(KvTransfer *transfer)
{
	if (transfer->easy)
		curl_easy_cleanup(transfer->easy);
	for (struct curl_slist *header = transfer->headers; header; header = header->next)
		kv_secret_wipe(header->data, strlen(header->data));
	curl_slist_free_all(transfer->headers);
	free(transfer->request_body);
	free_body(transfer);
	free(transfer);
}

static bool
copy_request(KvTransfer *transfer, const KvTransferRequest *request)
{
	if (request->body && (transfer->request_body = strdup(request->body)) == NULL)
		return false;
	for (const char *const *header = request->headers; *header; header++)
	{
		struct curl_slist *longer = curl_slist_append(transfer->headers, *header);

		if (longer == NULL)
			return false;
		transfer->headers = longer;
	}
	return true;
}

static void
set_options(KvTransfer *transfer, const KvTransferRequest *request)
{
	CURL	   *easy = transfer->easy;

	curl_easy_setopt(easy, CURLOPT_URL, request->url);
#if CURL_AT_LEAST_VERSION(7, 85, 0)
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, transfer->allow_private ? "http,https" : "https");
#else
	curl_easy_setopt(easy, CURLOPT_PROTOCOLS, transfer->allow_private ? CURLPROTO_HTTP | CURLPROTO_HTTPS : CURLPROTO_HTTPS);
#endif
	curl_easy_setopt(easy, CURLOPT_FOLLOWLOCATION, 0L);
	curl_easy_setopt(easy, CURLOPT_PROXY, "");
	curl_easy_setopt(easy, CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);
	curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long) CURL_HTTP_VERSION_2TLS);
	curl_easy_setopt(easy, CURLOPT_ACCEPT_ENCODING, "");
	curl_easy_setopt(easy, CURLOPT_USERAGENT, "keyvault/" KV_VERSION);
	curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
	curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long) kv_connect_timeout);
	curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, (long) request->timeout_ms);
	curl_easy_setopt(easy, CURLOPT_HTTPHEADER, transfer->headers);
	if (request->ca_file && *request->ca_file)
	{
		curl_easy_setopt(easy, CURLOPT_CAINFO, request->ca_file);
		curl_easy_setopt(easy, CURLOPT_CAPATH, NULL);
	}
	if (transfer->request_body)
	{
		curl_easy_setopt(easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) strlen(transfer->request_body));
		curl_easy_setopt(easy, CURLOPT_POSTFIELDS, transfer->request_body);
	}
	kv_https_keep_no_plaintext(easy);
	curl_easy_setopt(easy, CURLOPT_OPENSOCKETFUNCTION, open_socket);
	curl_easy_setopt(easy, CURLOPT_OPENSOCKETDATA, transfer);
	curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, take_body);
	curl_easy_setopt(easy, CURLOPT_WRITEDATA, transfer);
	curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, transfer->error);
	curl_easy_setopt(easy, CURLOPT_PRIVATE, transfer);
}

/* Begin a call. False, with a reason, when it cannot be made; nothing was sent then. */
bool
kv_transfer_start(KvTransferPool *pool, const KvTransferRequest *request, char *error, Size error_size)
{
	KvTransfer *transfer;
	bool		allowed;
	bool		started;

	if (!check_url(request, &allowed, error, error_size))
		return false;
	transfer = calloc(1, sizeof(KvTransfer));
	if (transfer == NULL)
	{
		snprintf(error, error_size, "out of memory");
		return false;
	}
	transfer->owner = request->owner;
	transfer->allow_private = allowed;
	transfer->size_max = request->is_own_server ? OWN_ANSWER_MAX : (Size) kv_max_response_size * 1024;
	transfer->easy = curl_easy_init();
	started = transfer->easy != NULL && copy_request(transfer, request);
	if (started)
	{
		set_options(transfer, request);
		kv_https_leave_resolver(pool->multi, transfer->easy);
		sigprocmask(SIG_SETMASK, &BlockSig, NULL);
		started = curl_multi_add_handle(pool->multi, transfer->easy) == CURLM_OK;
		sigprocmask(SIG_SETMASK, &UnBlockSig, NULL);
	}
	if (!started)
	{
		snprintf(error, error_size, "out of memory");
		free_transfer(transfer);
	}
	return started;
}

/* Seconds of a Retry-After header as milliseconds, or -1. libcurl reads both of its forms. */
static long
retry_after_ms(CURL *easy)
{
	curl_off_t	seconds = 0;

	if (curl_easy_getinfo(easy, CURLINFO_RETRY_AFTER, &seconds) != CURLE_OK || seconds <= 0)
		return -1;
	return (long) Min(seconds, 86400) * 1000;
}

static void
describe_error(KvTransfer *transfer, CURLcode code, KvTransferResult *result)
{
	if (transfer->address_refused)
		snprintf(result->error, sizeof(result->error),
				 "the provider's host is at a private or loopback address, which providers.allowed_host does not allow");
	else if (transfer->too_large)
		snprintf(result->error, sizeof(result->error), "the answer is larger than keyvault.max_response_size");
	else if (code != CURLE_OK)
		snprintf(result->error, sizeof(result->error), "%s",
				 transfer->error[0] ? transfer->error : curl_easy_strerror(code));
}

/* The next call that has ended, if any; the caller frees result->transfer. */
bool
kv_transfer_next(KvTransferPool *pool, KvTransferResult *result)
{
	CURLMsg    *message;
	int			left;

	while ((message = curl_multi_info_read(pool->multi, &left)) != NULL)
	{
		KvTransfer *transfer;
		long		request_size = 0;
		CURLcode	code;

		if (message->msg != CURLMSG_DONE)
			continue;
		code = message->data.result;
		curl_easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, (char **) &transfer);
		memset(result, 0, sizeof(*result));
		result->owner = transfer->owner;
		result->transfer = transfer;
		curl_easy_getinfo(transfer->easy, CURLINFO_RESPONSE_CODE, &result->status_code);
		curl_easy_getinfo(transfer->easy, CURLINFO_REQUEST_SIZE, &request_size);
		result->retry_after_ms = retry_after_ms(transfer->easy);
		result->nothing_sent = request_size == 0;
		result->refused = transfer->address_refused || transfer->too_large;
		describe_error(transfer, code, result);
		result->body = transfer->body;
		result->length = transfer->length;
		curl_multi_remove_handle(pool->multi, transfer->easy);
		return true;
	}
	return false;
}

void
kv_transfer_free(KvTransferPool *pool, KvTransfer *transfer)
{
	free_transfer(transfer);
}
