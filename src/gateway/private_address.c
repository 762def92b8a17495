/*-------------------------------------------------------------------------
 * private_address.c
 *		Addresses that the public network does not route: private, loopback, special.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/private_address.h"

#include <arpa/inet.h>
#include <netinet/in.h>

static bool
ipv4_is_private(uint32 address)
{
	static const struct
	{
		uint32		network;
		int			bits;
	}			ranges[] = {
		/* IANA IPv4 Special-Purpose Address Registry (RFC 6890), multicast and reserved space */
		{0x00000000, 8}, {0x0a000000, 8}, {0x64400000, 10}, {0x7f000000, 8}, {0xa9fe0000, 16},
		{0xac100000, 12}, {0xc0000000, 24}, {0xc0000200, 24}, {0xc0586300, 24}, {0xc0a80000, 16},
		{0xc6120000, 15}, {0xc6336400, 24}, {0xcb007100, 24}, {0xe0000000, 3},
	};

	for (size_t i = 0; i < lengthof(ranges); i++)
		if ((address ^ ranges[i].network) >> (32 - ranges[i].bits) == 0)
			return true;
	return false;
}

static uint32
read_ipv4(const uint8 *bytes)
{
	return (uint32) bytes[0] << 24 | (uint32) bytes[1] << 16 | (uint32) bytes[2] << 8 | bytes[3];
}

static bool
ipv6_is_private(const uint8 *bytes)
{
	static const uint8 zeros[12] = {0};
	static const uint8 mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
	static const uint8 nat64[12] = {0x00, 0x64, 0xff, 0x9b};

	/* IPv4 inside IPv6: mapped, compatible, NAT64 (RFC 6052), 6to4 (RFC 3056) */
	if (memcmp(bytes, mapped, 12) == 0 || memcmp(bytes, nat64, 12) == 0)
		return ipv4_is_private(read_ipv4(bytes + 12));
	if (memcmp(bytes, zeros, 12) == 0)
		return true;
	if (bytes[0] == 0x20 && bytes[1] == 0x02)
		return ipv4_is_private(read_ipv4(bytes + 2));
	/* Global unicast is 2000::/3; of it, 2001::/23 and 2001:db8::/32 are special (RFC 6890) */
	if ((bytes[0] & 0xe0) != 0x20)
		return true;
	return bytes[0] == 0x20 && bytes[1] == 0x01 && (bytes[2] < 2 || (bytes[2] == 0x0d && bytes[3] == 0xb8));
}

/* Is an address of a socket one that the public network does not route? */
bool
kv_private_address(const struct sockaddr *address)
{
	if (address->sa_family == AF_INET)
		return ipv4_is_private(ntohl(((const struct sockaddr_in *) address)->sin_addr.s_addr));
	if (address->sa_family == AF_INET6)
		return ipv6_is_private(((const struct sockaddr_in6 *) address)->sin6_addr.s6_addr);
	return true;
}
