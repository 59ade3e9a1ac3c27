"""Which addresses a URL given by a caller may lead to."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_REFUSED_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "168.63.129.16/32",  # a cloud's platform endpoint, inside public space
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)

# Everything else of IPv6 is loopback, local, multicast, a translation of IPv4 or not handed out.
_GLOBAL_V6 = IPv6Network("2000::/3")
_REFUSED_V6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))

_NAT64 = tuple(map(IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48")))
_IPV4_COMPATIBLE = IPv6Network("::/96")


def permitted(text: str, allowed: Collection[Network] = ()) -> bool:
    """Whether a connection to the address ``text`` may be made: it is public, or in an ``allowed`` network.

    An IPv4-mapped address is judged as the IPv4 address that it stands for. Other forms that carry an
    IPv4 address inside need both themselves and the inner address to pass.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return _passes(address.ipv4_mapped, allowed)
        inner = _inner(address)
        if inner is not None and not _passes(inner, allowed):
            return False
    return _passes(address, allowed)


def _passes(address: Address, allowed: Collection[Network]) -> bool:
    return _is_public(address) or any(address in network for network in allowed)


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _REFUSED_V6)


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a translator or tunnel would send to."""
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    in_last_bits = any(address in network for network in _NAT64)
    # ::1 and :: lie in the range of IPv4-compatible addresses without being any.
    if in_last_bits or (address in _IPV4_COMPATIBLE and int(address) > 1):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None
