/* Preloaded into a command and all its children: one line in $NETWORK_LOG for each name looked up and each address used.
   Unix sockets are not the network, and are left out. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const char *what)
{
    char line[512];
    const char *path = getenv("NETWORK_LOG");
    if (path == NULL)
        return;
    int length = snprintf(line, sizeof line, "%s %s\n", call, what);
    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file >= 0) {
        if (write(file, line, (size_t)length) < 0) { /* nothing can be done about it */ }
        close(file);
    }
}

static void note_address(const char *call, const struct sockaddr *address)
{
    char text[INET6_ADDRSTRLEN] = "?";
    if (address == NULL)
        return;
    if (address->sa_family == AF_INET)
        inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
    else if (address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
    else
        return;
    note(call, text);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
    note("lookup", node ? node : "(any)");
    return next(node, service, hints, found);
}

struct hostent *gethostbyname(const char *name)
{
    struct hostent *(*next)(const char *) = dlsym(RTLD_NEXT, "gethostbyname");
    note("lookup", name);
    return next(name);
}

int socket(int family, int type, int protocol)
{
    int (*next)(int, int, int) = dlsym(RTLD_NEXT, "socket");
    if (family == AF_INET || family == AF_INET6)
        note("socket", family == AF_INET ? "ipv4" : "ipv6");
    return next(family, type, protocol);
}

int bind(int descriptor, const struct sockaddr *address, socklen_t length)
{
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    note_address("bind", address);
    return next(descriptor, address, length);
}

int connect(int descriptor, const struct sockaddr *address, socklen_t length)
{
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    int type = 0;
    socklen_t size = sizeof type;
    getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &type, &size);
    note_address(type == SOCK_DGRAM ? "route" : "connect", address); /* a datagram socket sends nothing when it is connected */
    return next(descriptor, address, length);
}

ssize_t sendto(int descriptor, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length)
{
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    note_address("sendto", address);
    return next(descriptor, data, size, flags, address, length);
}
