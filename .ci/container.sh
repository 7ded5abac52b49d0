#!/usr/bin/env bash
# Installs what builds and runs a container, and prints the path of a base image for
# it: Debian 13 with its Python 3.13, no shell and no byte code, as distroless has it.
# The bases that Dockerfile names come from registries, which CI need not reach.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash .ci/run packages buildah podman runc debootstrap >&2

cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/health-check-ci
mkdir -p "$cache"
exec 9>"$cache/lock-base"
flock 9
base=$cache/base-$(sha256sum .ci/container.sh | cut -c 1-12).tar
if [[ ! -e $base ]]; then
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT
    debootstrap --variant=minbase --include=python3 trixie "$tmp/root" >&2
    rm -rf "$tmp"/root/usr/bin/{sh,dash,bash,rbash} "$tmp"/root/var/{cache,lib}/apt \
        "$tmp"/root/usr/share/{doc,man,locale}
    find "$tmp/root" -name __pycache__ -prune -exec rm -rf {} +
    tar -C "$tmp/root" -cf "$tmp/base.tar" .
    rm -f "$cache"/base-*.tar
    mv "$tmp/base.tar" "$base"
fi
echo "$base"
