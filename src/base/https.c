/*-------------------------------------------------------------------------
 * https.c
 *		One HTTPS call, waited for, which interrupts end at once.
 *
 * https only, but to a loopback address; no redirects, no proxy, nothing from the
 * environment. Callbacks never throw: they set state. While libcurl runs, signals are
 * blocked, so that threads of its resolver inherit the blocked mask.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/https.h"

#include <malloc.h>
#include <signal.h>
#include <unistd.h>

#include <curl/curl.h>
#include <openssl/ssl.h>

#include "base/error.h"
#include "base/secret.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"

/* Interrupts are served at least this often while waiting. */
#define POLL_MS 100

typedef struct Call
{
	CURLM	   *multi;
	CURL	   *easy;
	struct curl_slist *headers;
	char	   *body;			/* secret memory of size_max + 1 bytes */
	Size		length;
	Size		size_max;
	bool		too_large;
	char		error[CURL_ERROR_SIZE];
} Call;

static void
wipe_and_free(void *memory)
{
	if (memory)
		kv_secret_wipe(memory, malloc_usable_size(memory));
	free(memory);
}

static void *
reallocate(void *memory, size_t length)
{
	void	   *other = malloc(length);

	if (other && memory)
	{
		memcpy(other, memory, Min(length, malloc_usable_size(memory)));
		wipe_and_free(memory);
	}
	return other;
}

/*
 * Make libcurl ready, once per process: what it frees is wiped, for it has tokens, keys and
 * answers in its buffers. It is libc's memory all the same: others in this process, who may
 * use libcurl too, can free it. False when there is none.
 */
bool
kv_https_initialize(void)
{
	static bool initialized = false;

	if (initialized)
		return true;
	/* The environment must not have TLS secrets recorded. */
	unsetenv("SSLKEYLOGFILE");
	initialized = curl_global_init_mem(CURL_GLOBAL_DEFAULT, malloc, wipe_and_free, reallocate, strdup, calloc) == CURLE_OK;
	return initialized;
}

/* OpenSSL keeps what it has decrypted until there is more, and past the end of the connection, unless it is told not to. */
static CURLcode
cleanse_plaintext(CURL *easy, void *context, void *arg)
{
	SSL_CTX_set_options(context, SSL_OP_CLEANSE_PLAINTEXT);
	return CURLE_OK;
}

/* Have what a call, a handle of libcurl, receives wiped in OpenSSL's buffers once it is read. */
void
kv_https_keep_no_plaintext(void *easy)
{
	if (strncmp(curl_version_info(CURLVERSION_NOW)->ssl_version, "OpenSSL/", 8) == 0)
		curl_easy_setopt(easy, CURLOPT_SSL_CTX_FUNCTION, cleanse_plaintext);
}

/*
 * Have a call that ends while its host's name is looked up not wait for that, nor the multi handle's end; both are handles
 * of libcurl. The resolver's thread ends by itself, and frees what it has. Before 7.87 libcurl waits.
 */
void
kv_https_leave_resolver(void *multi, void *easy)
{
#if CURL_AT_LEAST_VERSION(7, 87, 0)
	curl_easy_setopt(easy, CURLOPT_QUICK_EXIT, 1L);
#endif
#if CURL_AT_LEAST_VERSION(8, 20, 0)
	curl_multi_setopt(multi, CURLMOPT_QUICK_EXIT, 1L);
#endif
}

static size_t
take_body(char *bytes, size_t size, size_t count, void *arg)
{
	Call	   *call = arg;
	Size		length = size * count;

	if (length > call->size_max - call->length)
	{
		call->too_large = true;
		return 0;
	}
	memcpy(call->body + call->length, bytes, length);
	call->length += length;
	return length;
}

/* Does a host, as a URL writes it, mean this machine? */
bool
kv_https_host_is_loopback(const char *host)
{
	return strcmp(host, "localhost") == 0 || strcmp(host, "127.0.0.1") == 0 || strcmp(host, "[::1]") == 0;
}

/* May the URL be called? False with a reason. *plain tells whether it is http. */
static bool
check_url(const char *text, bool *plain, char *error, Size error_size)
{
	CURLU	   *url = curl_url();
	char	   *scheme = NULL;
	char	   *host = NULL;
	bool		usable;

	*plain = false;
	usable = url != NULL && curl_url_set(url, CURLUPART_URL, text, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_SCHEME, &scheme, 0) == CURLUE_OK &&
		curl_url_get(url, CURLUPART_HOST, &host, 0) == CURLUE_OK;
	if (!usable)
		snprintf(error, error_size, "the address is not a URL");
	else if (strcmp(scheme, "https") != 0)
	{
		*plain = strcmp(scheme, "http") == 0 && kv_https_host_is_loopback(host);
		usable = *plain;
		if (!usable)
			snprintf(error, error_size, "the address must begin with https://; http:// is for a loopback address only");
	}
	curl_free(scheme);
	curl_free(host);
	curl_url_cleanup(url);
	return usable;
}

/* Make libcurl's handles; false when there is no memory. */
static bool
prepare(Call *call, const KvHttpsRequest *request, bool plain)
{
	for (const char *const *header = request->headers; header && *header; header++)
	{
		struct curl_slist *longer = curl_slist_append(call->headers, *header);

		if (longer == NULL)
			return false;
		call->headers = longer;
	}
	call->multi = curl_multi_init();
	call->easy = curl_easy_init();
	if (call->multi == NULL || call->easy == NULL)
		return false;
	curl_easy_setopt(call->easy, CURLOPT_URL, request->url);
#if CURL_AT_LEAST_VERSION(7, 85, 0)
	curl_easy_setopt(call->easy, CURLOPT_PROTOCOLS_STR, plain ? "http" : "https");
#else
	curl_easy_setopt(call->easy, CURLOPT_PROTOCOLS, plain ? CURLPROTO_HTTP : CURLPROTO_HTTPS);
#endif
	curl_easy_setopt(call->easy, CURLOPT_FOLLOWLOCATION, 0L);
	curl_easy_setopt(call->easy, CURLOPT_PROXY, "");
	curl_easy_setopt(call->easy, CURLOPT_NETRC, (long) CURL_NETRC_IGNORED);
	curl_easy_setopt(call->easy, CURLOPT_USERAGENT, "keyvault/" KV_VERSION);
	curl_easy_setopt(call->easy, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(call->easy, CURLOPT_TIMEOUT_MS, (long) request->timeout_ms);
	curl_easy_setopt(call->easy, CURLOPT_HTTPHEADER, call->headers);
	if (request->ca_file && *request->ca_file)
	{
		curl_easy_setopt(call->easy, CURLOPT_CAINFO, request->ca_file);
		curl_easy_setopt(call->easy, CURLOPT_CAPATH, NULL);
	}
	kv_https_keep_no_plaintext(call->easy);
	kv_https_leave_resolver(call->multi, call->easy);
	if (request->body)
	{
		curl_easy_setopt(call->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t) strlen(request->body));
		curl_easy_setopt(call->easy, CURLOPT_POSTFIELDS, request->body);
	}
	curl_easy_setopt(call->easy, CURLOPT_WRITEFUNCTION, take_body);
	curl_easy_setopt(call->easy, CURLOPT_WRITEDATA, call);
	curl_easy_setopt(call->easy, CURLOPT_ERRORBUFFER, call->error);
	return curl_multi_add_handle(call->multi, call->easy) == CURLM_OK;
}

static void
release(Call *call)
{
	if (call->multi && call->easy)
		curl_multi_remove_handle(call->multi, call->easy);
	curl_easy_cleanup(call->easy);
	curl_multi_cleanup(call->multi);
	for (struct curl_slist *header = call->headers; header; header = header->next)
		kv_secret_wipe(header->data, strlen(header->data));
	curl_slist_free_all(call->headers);
}

/* Let libcurl work until the call has ended, and return how. */
static CURLcode
drive(Call *call)
{
	CURLcode	code = CURLE_FAILED_INIT;
	CURLMsg    *message;
	sigset_t	before;
	int			running = 1;
	int			left;

	while (running)
	{
		CURLMcode	result;

		sigprocmask(SIG_SETMASK, &BlockSig, &before);
		result = curl_multi_perform(call->multi, &running);
		sigprocmask(SIG_SETMASK, &before, NULL);
		if (result != CURLM_OK)
			return CURLE_FAILED_INIT;
		CHECK_FOR_INTERRUPTS();
		if (running)
			(void) curl_multi_poll(call->multi, NULL, 0, POLL_MS, NULL);
	}
	while ((message = curl_multi_info_read(call->multi, &left)) != NULL)
		if (message->msg == CURLMSG_DONE)
			code = message->data.result;
	return code;
}

/*
 * Make a call and wait for its answer; false, with response->error, when there is none. An
 * HTTP status that is an error is an answer. Errors: only those of interrupts and memory.
 */
bool
kv_https_call(const KvHttpsRequest *request, KvHttpsResponse *response)
{
	Call		call = {.size_max = request->size_max};
	volatile CURLcode code = CURLE_OUT_OF_MEMORY;
	bool		plain;

	memset(response, 0, sizeof(*response));
	if (!kv_https_initialize())
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY), errmsg("could not initialize libcurl")));
	if (!check_url(request->url, &plain, response->error, sizeof(response->error)))
		return false;
	call.body = kv_secret_alloc(request->size_max + 1);
	PG_TRY();
	{
		if (prepare(&call, request, plain))
			code = drive(&call);
		if (code == CURLE_OK)
			curl_easy_getinfo(call.easy, CURLINFO_RESPONSE_CODE, &response->status);
	}
	PG_FINALLY();
	{
		release(&call);
	}
	PG_END_TRY();
	if (call.too_large)
		snprintf(response->error, sizeof(response->error), "the answer is longer than %zu bytes", request->size_max);
	else if (code != CURLE_OK)
		strlcpy(response->error, call.error[0] ? call.error : curl_easy_strerror(code), sizeof(response->error));
	call.body[call.length] = '\0';
	response->body = call.body;
	response->length = call.length;
	return response->error[0] == '\0';
}
