#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Brings what the QEMU build needs into the cache folder, once: QEMU's source,
# the Python wheels its configure wants, and the firmware, all through apt and
# pip as this machine has them set up. With everything cached it needs no net.
#
#   scripts/qemu-fetch.sh        prints "version tarball wheels-dir firmware-dir"
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(dirname "$here")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/libfvd
dl=$cache/download

die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }
say() { printf '%s\n' "$*" >&2; }

want=$(cat "$top/qemu-patch/QEMU_VERSION")
series=${want%.*}

# Versions whose tarball we know, best first. Debian's pool keeps only the
# newest point release of a suite: the list is tried in order, and only when
# none is left, what the suite offers today is taken, on apt's signature.
known=(
    "10.0.13 6a0888e806c2ffc0c5f0733e974f9aea55491950d3c47c98669c8b236dde59ae"
    "10.0.2 0901da33844a331bf8b3602b9c1fbd178e60b737c8e3ade678255bd090c9b9f1"
)
suite=trixie

mkdir -p "$dl"
exec 9>"$dl/.lock"
flock 9

apt_opts=()
if [ "$(id -u)" -eq 0 ]; then
    apt_opts+=(-o APT::Sandbox::User=root)
fi

repo_uris() {
    apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | sed 's#/*$##' | sort -u
}

# A list of package indexes of our own beside the machine's, so that nothing of
# the system is changed and no root is needed. $1: folder, rest: source lines.
private_apt() {
    local dir=$1
    shift
    mkdir -p "$dir/lists/partial" "$dir/empty"
    printf '%s\n' "$@" >"$dir/sources.list"
    private_opts=("${apt_opts[@]}" -o Dir::Etc::sourcelist="$dir/sources.list"
        -o Dir::Etc::sourceparts="$dir/empty" -o Dir::State::lists="$dir/lists"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    apt-get "${private_opts[@]}" update -q >&2
}

# --- QEMU's source -----------------------------------------------------------

have_tarball() { # version, checksum or "signed"
    local file=$dl/qemu_$1+ds.orig.tar.xz
    [ -f "$file" ] || return 1
    [ "$2" = signed ] || echo "$2  $file" | sha256sum --check --status ||
        die "$file has a wrong checksum; remove it and run again"
}

fetch_known() { # version checksum
    local uri file=qemu_$1+ds.orig.tar.xz
    for uri in $(repo_uris); do
        if /usr/lib/apt/apt-helper "${apt_opts[@]}" download-file \
                "$uri/pool/main/q/qemu/$file" "$dl/$file.part" "SHA256:$2" >&2; then
            mv "$dl/$file.part" "$dl/$file"
            return 0
        fi
    done
    rm -f "$dl/$file.part"
    return 1
}

fetch_signed() {
    local uri work file
    work=$(mktemp -d "$dl/apt.XXXXXX")
    for uri in $(repo_uris); do
        (cd "$work" && private_apt "$work/apt" \
            "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri $suite main" &&
            apt-get "${private_opts[@]}" source --download-only --only-source qemu >&2) || continue
        file=$(find "$work" -maxdepth 1 -name "qemu_$series.*+ds.orig.tar.xz")
        if [ -n "$file" ]; then
            mv "$file" "$dl/"
            # Debian's signature was checked by apt just now: remember that.
            touch "$dl/$(basename "$file").signed"
            rm -rf "$work"
            return 0
        fi
    done
    rm -rf "$work"
    return 1
}

cached_version() {
    local entry file
    for entry in "${known[@]}"; do
        # shellcheck disable=SC2086 # two words on purpose
        have_tarball $entry && { echo "${entry%% *}"; return 0; }
    done
    for file in "$dl"/qemu_"$series".*+ds.orig.tar.xz.signed; do
        [ -e "$file" ] || continue
        file=${file##*/qemu_}
        echo "${file%%+*}"
        return 0
    done
    return 1
}

version=$(cached_version || true)
if [ -z "$version" ]; then
    say "fetching QEMU $want"
    for entry in "${known[@]}"; do
        # shellcheck disable=SC2086
        fetch_known $entry && break
    done
    version=$(cached_version || { fetch_signed && cached_version; }) ||
        die "QEMU $series.x is not to be had: neither a known tarball nor $suite's from $(repo_uris | tr '\n' ' ')"
fi
tarball=$dl/qemu_$version+ds.orig.tar.xz

# --- Python wheels -----------------------------------------------------------
# Debian's tarball leaves them out, and Debian 12's meson is too old for QEMU.

wheels=$dl/wheels-$series
if [ ! -e "$wheels/.complete" ]; then
    say "fetching the Python wheels of QEMU's build"
    rm -rf "$wheels"
    mkdir -p "$wheels"
    cat >"$wheels/requirements.txt" <<'REQ'
meson==1.5.0 --hash=sha256:52b34f4903b882df52ad0d533146d4b992c018ea77399f825579737672ae7b20
pycotap==1.3.1 --hash=sha256:1c3a25b3ff89e48f4e00f1f71dbbc1642b4f65c65d416524d07e73492fff25ea
qemu.qmp==0.0.3 --hash=sha256:9abf451e22c0964580135aef7e2b95c5da0bf63c692426da24fc38b56ff0ac8e
REQ
    /usr/bin/python3 -m pip --disable-pip-version-check download -q --no-deps \
        --only-binary :all: --require-hashes -r "$wheels/requirements.txt" -d "$wheels" >&2 ||
        die "pip could not download the wheels"
    touch "$wheels/.complete"
fi

# --- Firmware ----------------------------------------------------------------
# BIOS, VGA BIOS, boot ROMs of the network cards, keymaps for VNC: from Debian's
# packages, unpacked and not installed (an installed QEMU must not be touched).

firmware=$dl/firmware-1
if [ ! -e "$firmware/.complete" ]; then
    say "fetching firmware"
    rm -rf "$firmware"
    mkdir -p "$firmware/share/keymaps" "$firmware/doc"
    work=$(mktemp -d "$dl/deb.XXXXXX")
    debs=(seabios qemu-system-data ipxe-qemu)
    if ! (cd "$work" && apt-get "${apt_opts[@]}" download -q "${debs[@]}" >&2); then
        # No usable package lists on this machine: read them privately.
        mapfile -t lines < <(apt-get indextargets --format \
            'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(REPO_URI) $(RELEASE) $(COMPONENT)' |
            sort -u)
        (cd "$work" && private_apt "$work/apt" "${lines[@]}" &&
            apt-get "${private_opts[@]}" download -q "${debs[@]}" >&2) ||
            die "apt could not download: ${debs[*]}"
    fi
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$work/root"
    done
    share=$work/root/usr/share
    for file in "$share"/seabios/*.bin "$share"/qemu/*.bin "$share"/qemu/*.rom "$share"/qemu/*.img \
                "$work"/root/usr/lib/ipxe/qemu/*.rom; do
        # Only what an x86 machine loads; package links lead outside the tree.
        case ${file##*/} in
            bios*.bin | vgabios*.bin | linuxboot*.bin | multiboot*.bin | pvh.bin | kvmvapic.bin | *.rom)
                if [ -f "$file" ]; then
                    cp -L "$file" "$firmware/share/"
                fi ;;
        esac
    done
    cp -L "$share"/qemu/keymaps/* "$firmware/share/keymaps/"
    for name in "${debs[@]}"; do
        cp -L "$share/doc/$name/copyright" "$firmware/doc/$name.copyright"
    done
    for file in bios.bin bios-256k.bin vgabios-stdvga.bin linuxboot_dma.bin pvh.bin kvmvapic.bin \
                efi-virtio.rom efi-e1000.rom keymaps/en-us; do
        [ -s "$firmware/share/$file" ] || die "firmware $file is missing from ${debs[*]}"
    done
    rm -rf "$work"
    touch "$firmware/.complete"
fi

printf '%s %s %s %s\n' "$version" "$tarball" "$wheels" "$firmware"
