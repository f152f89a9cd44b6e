#!/bin/busybox sh
# The guest's first process, from the initramfs: makes the machine's own files the root, read-only
# below and with memory above, and hands over to what is to be run.
# `malla-vm:` lines on the second serial port are for xtask; the kernel has the first one.
export PATH=/bin
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /host /memory /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
say() { echo "malla-vm: $*" >/dev/ttyS1; }
must() { "$@" || { say "failed: $*"; sleep 60; }; }
stty -F /dev/ttyS1 raw
# A machine that gets this far works: xtask waits for this word.
say started
for module in /modules/*; do must insmod "$module"; done
# The files don't change while the guest reads them, so they are cached.
must mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
must mount -t tmpfs memory /memory
mkdir /memory/upper /memory/work
must mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work root /root
mount -t tmpfs run /root/run
cp /guest /root/run/guest
for folder in proc sys dev; do must mount --move /$folder /root/$folder; done
exec switch_root /root /bin/sh /run/guest
