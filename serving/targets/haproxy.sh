#!/bin/sh
# Starts HAProxy for Ray Serve with its metrics and statistics on loopback: Ray binds these two to every interface.
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -E 's/^( *bind )\*?:([0-9]+)/\1127.0.0.1:\2/' "$argument"
    fi
    previous=$argument
done
exec "$PARETUNE_HAPROXY" "$@"
