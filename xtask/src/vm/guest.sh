# Goes on in the machine's own root: mounts what a booted Debian has, then come the commands.
exec </dev/null >/dev/ttyS1 2>&1
mkdir -p /dev/net /dev/pts /dev/shm /lib/modules
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
mount -t securityfs security /sys/kernel/security
# The kernel loads the module when it is opened.
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
ip link set lo up
ulimit -Hn 1048576
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# The kernel asks for its modules by itself as they are needed.
ln -sfn "$MODULES" "/lib/modules/$(uname -r)"
end() { printf '\nmalla-vm: ended %s\n' "$1"; sleep 60; }
