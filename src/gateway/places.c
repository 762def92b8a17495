/*-------------------------------------------------------------------------
 * places.c
 *		How many calls may be under way at once.
 *
 * That is keyvault.max_concurrent_requests, as far as this process may open files enough;
 * requests beyond wait in the queue. Ours is what the server does not use of the process's
 * limit, and of what it does the third that it leaves to others who tell it.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/places.h"

#include <sys/resource.h>

#include "base/error.h"
#include "base/settings.h"
#include "storage/fd.h"

/* For a call: the pair of sockets by which libcurl hears of a lookup's end, and the resolver's own; then two connections that are tried. */
#define DESCRIPTORS_PER_CALL 3

/* Of that third, for sets of events and what else is opened in this process. */
#define LEFT_TO_OTHERS 16

/* Open without the server's counting them: its log, latches, sets of events. */
#define UNCOUNTED 64

static int	places = 1;

/* How many descriptors of ours the server knows of. */
static int	reserved = 0;

/* How many descriptors this process may have beyond those that the server counts on. */
static int
spare_descriptors(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
		return 0;
	return (int) Min(limit.rlim_cur, PG_INT32_MAX / 2) - max_safe_fds - UNCOUNTED;
}

/* Find the number of places out again: at the start, and after a reload. */
void
kv_places_configure(void)
{
	int			spare = Max(spare_descriptors(), 0);
	int			shared = Max(max_safe_fds / 3 - LEFT_TO_OTHERS, 0);
	int			most = Max((spare + shared) / DESCRIPTORS_PER_CALL, 1);

	places = Min(kv_max_concurrent_requests, most);
	for (; reserved < places * DESCRIPTORS_PER_CALL - spare; reserved++)
		ReserveExternalFD();
	for (; reserved > 0 && reserved > places * DESCRIPTORS_PER_CALL - spare; reserved--)
		ReleaseExternalFD();
	if (places < kv_max_concurrent_requests)
		ereport(LOG,
				(errmsg("keyvault.max_concurrent_requests is %d, but the limit of open files is enough for %d calls at once",
						kv_max_concurrent_requests, places),
				 errhint("Raise the limit that the server is started with: LimitNOFILE of its systemd unit, or ulimit -n.")));
}

int
kv_places(void)
{
	return places;
}
