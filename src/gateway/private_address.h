/*-------------------------------------------------------------------------
 * private_address.h
 *		Addresses that the public network does not route.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PRIVATE_ADDRESS_H
#define KV_PRIVATE_ADDRESS_H

#include "postgres.h"

#include <sys/socket.h>

extern bool kv_private_address(const struct sockaddr *address);

#endif
