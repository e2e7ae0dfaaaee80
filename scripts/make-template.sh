#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# Makes the template disk of `make run` from Debian packages and prints its path:
# the root file system of the Debian release this machine runs, systemd as shipped,
# Debian's cloud kernel with its own initramfs, GRUB in the MBR, one ext4 partition.
# No loop device and no mount of the image: mke2fs fills the partition, and GRUB
# finds its core image behind the MBR.
#
#   make-template.sh          make it unless it is there, print the path
#   make-template.sh --path   print the path only
#
# Environment: TEMPLATE_SIZE (MiB, default 2048), XDG_CACHE_HOME, V=1 (all messages).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin # not in everybody's, holds mke2fs
umask 022

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
overlay=$here/guest/rootfs
size_mib=${TEMPLATE_SIZE:-2048}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/libfvd

say() { printf 'make-template: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# shellcheck source=/dev/null
. /etc/os-release
[ "${ID:-}" = debian ] && [ -n "${VERSION_CODENAME:-}" ] || die "this needs a Debian machine (found ${ID:-unknown})"
codename=$VERSION_CODENAME

# The name says what the file was made from, so a changed script makes a new one.
hash=$({
    printf '%s %s\n' "$codename" "$size_mib"
    cat "${BASH_SOURCE[0]}"
    find "$overlay" -type f -print0 | LC_ALL=C sort -z | while IFS= read -r -d '' file; do
        printf '%s\n' "${file#"$overlay"}"
        cat "$file"
    done
} | sha256sum | cut -c1-12)
template=$cache/template-$hash.raw

if [ "${1:-}" = --path ] || [ -s "$template" ]; then
    printf '%s\n' "$template"
    exit 0
fi

mkdir -p "$cache"
# Two runs at once: the second waits and takes what the first made.
exec 9>"$cache/template.lock"
flock 9
if [ -s "$template" ]; then
    printf '%s\n' "$template"
    exit 0
fi

sudo=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "run this as root or install sudo"
    sudo=(sudo)
fi

missing=()
for package in mmdebstrap e2fsprogs; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]}"
    "${sudo[@]}" apt-get install -y -q --no-remove --no-install-recommends "${missing[@]}" >&2
fi

# The machine's own sources for this release, and nothing else of what it uses.
# The origin is known only once the lists have been fetched.
sources() {
    apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)|$(RELEASE)' 'Created-By: Packages' |
        awk -F'|' -v c="$codename" '$1 == "Debian" && $3 == "main" &&
            ($2 == c || $2 == c "-updates" || $2 == c "-security") { print "deb " $4 " " $5 " " $3 }' | sort -u
}
if [ -z "$(sources)" ]; then
    "${sudo[@]}" apt-get update -q >&2
fi
[ -n "$(sources)" ] || die "apt knows no Debian $codename source"

work=$(mktemp -d "${TMPDIR:-/tmp}/fvd-template.XXXXXX")
chmod 755 "$work" # apt's own user reads the lists
trap '"${sudo[@]}" rm -rf --one-file-system "$work"' EXIT
log=$work/log

run() { # shows a command's messages only when it fails
    if [ -n "${V:-}" ]; then
        "$@" >&2
    elif ! "$@" >"$log" 2>&1; then
        tail -n 40 "$log" >&2
        die "failed: $1"
    fi
}

# What comes before the kernel package, so that its initramfs is right at once:
# fstab (fsck at boot) and the initramfs settings.
cat >"$work/before" <<'EOF'
#!/bin/sh
set -eu
root=$1
echo 'LABEL=fvd-root / ext4 errors=remount-ro 0 1' >"$root/etc/fstab"
mkdir -p "$root/etc/initramfs-tools/conf.d"
# dep and list would need the running system; these are the disks QEMU offers.
echo 'MODULES=list' >"$root/etc/initramfs-tools/conf.d/fvd"
printf '%s\n' virtio_pci virtio_blk virtio_scsi sd_mod ahci ata_piix nvme ext4 >"$root/etc/initramfs-tools/modules"
EOF

cat >"$work/after" <<'EOF'
#!/bin/sh
set -eu
root=$1
# -r, not -a: owner and mode of the checkout's folders must not reach the guest's.
cp -r "$OVERLAY"/. "$root"/
: >"$root/etc/default/locale"
echo fvd-guest >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 fvd-guest\n' >"$root/etc/hosts"
chroot "$root" passwd -q -d root
chroot "$root" systemctl -q enable fvd-guest.service serial-getty@ttyS0.service
# Nothing of this is of use in a guest that lives for a minute; under TCG each process
# started at boot costs a second or so.
chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap.service systemd-timesyncd.service fstrim.timer \
    modprobe@.service sys-kernel-debug.mount sys-kernel-tracing.mount sys-fs-fuse-connections.mount \
    dev-hugepages.mount dev-mqueue.mount proc-sys-fs-binfmt_misc.automount \
    systemd-fsckd.socket systemd-pstore.service getty-static.service systemd-sysusers.service \
    systemd-modules-load.service systemd-update-utmp.service systemd-update-utmp-runlevel.service
# No trace of the mirror that was used.
rm -f "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d/* "$root/etc/resolv.conf"
echo '# Put the address of a Debian mirror here.' >"$root/etc/apt/sources.list"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/usr/share/doc/* "$root"/usr/share/man/*
find "$root/var/log" -type f -delete
# A fresh identity in every overlay ("uninitialized" would ask first-boot questions).
: >"$root/etc/machine-id"
test -s "$root/vmlinuz" -a -s "$root/initrd.img"
EOF
chmod +x "$work/before" "$work/after"

say "making a Debian $codename template (this takes some minutes, once)"
begin=$SECONDS
run "${sudo[@]}" env OVERLAY="$overlay" mmdebstrap --mode=root --variant=minbase --format=directory \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt=force-unsafe-io \
    --include=systemd-sysv,udev,kmod,login,passwd,e2fsprogs,util-linux,linux-image-cloud-amd64,initramfs-tools,busybox,zstd,grub-pc-bin,grub-common \
    --essential-hook="$work/before \"\$1\"" --customize-hook="$work/after \"\$1\"" \
    "$codename" "$work/root" - < <(sources)
say "root file system: $((SECONDS - begin)) s, $("${sudo[@]}" du -sm "$work/root" | cut -f1) MiB"

# GRUB: boot.img in the MBR, the core image right behind it (it expects itself at
# sector 1), both from the guest's own packages.
"${sudo[@]}" chroot "$work/root" grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /tmp/core.img \
    biosdisk part_msdos ext2 normal linux configfile serial terminal echo minicmd reboot halt ls cat
"${sudo[@]}" cp "$work/root/tmp/core.img" "$work/core.img"
"${sudo[@]}" rm "$work/root/tmp/core.img"
cp "$work/root/usr/lib/grub/i386-pc/boot.img" "$work/boot.img"

part=$work/template.raw
truncate -s "${size_mib}M" "$part"
# Features fixed here: e2fsprogs' defaults change, GRUB's reader must know them all.
run "${sudo[@]}" mke2fs -q -F -t ext4 -L fvd-root -m 1 -O ^metadata_csum_seed,^orphan_file \
    -E offset=1048576,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
    -d "$work/root" "$part" "$((size_mib - 1))M"

python3 - "$part" "$work/boot.img" "$work/core.img" <<'EOF'
import os, struct, sys
disk, boot, core = sys.argv[1:]
size = os.path.getsize(disk) // 512
first = 2048
with open(boot, "rb") as f:
    mbr = bytearray(f.read(440).ljust(512, b"\0"))
with open(core, "rb") as f:
    core_bytes = f.read()
if len(core_bytes) > (first - 1) * 512:
    sys.exit("GRUB's core image does not fit in front of the partition")
# One active Linux partition; the CHS fields are the usual "use LBA" values.
mbr[440:444] = b"FVD0"
mbr[446:462] = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, size - first)
mbr[510:512] = b"\x55\xaa"
with open(disk, "r+b") as f:
    f.write(mbr)
    f.write(core_bytes)
EOF

"${sudo[@]}" e2fsck -fn "$part?offset=1048576" >"$log" 2>&1 || { cat "$log" >&2; die "the new file system is not clean"; }
"${sudo[@]}" chown "$(id -u):$(id -g)" "$part"
chmod 444 "$part"
# Into the cache under a temporary name, then the name that counts: never half a file.
cp --sparse=always "$part" "$template.new"
mv -f "$template.new" "$template"
say "ready after $((SECONDS - begin)) s: $(du -m "$template" | cut -f1) MiB used of $size_mib"
printf '%s\n' "$template"
