#!/usr/bin/env bash
# Two machines that have nothing but each other, for test_onprem.py: namespaces for network, processes and mounts, Debian's
# sshd in each. Runs a command on a third, from which both are reached; all ends with it, since it is process 1 of its own.
#
#   unshare --net --pid --mount --fork --mount-proc --kill-child onprem_lab.sh FOLDER COMMAND...
#
# 10.77.0.1 this one, 10.77.0.10 the head, 10.77.0.11 the worker. FOLDER/host-10 and -11 are their homes.
set -euo pipefail
folder=$1; shift
mount --make-rprivate /
mount --bind "$folder" /mnt   # since /tmp becomes another for each machine: Ray leaves its addresses there
ip link set lo up
ip link add lab type bridge
ip addr add 10.77.0.1/24 dev lab
ip link set lab up

key() { ssh-keygen -q -t ed25519 -N '' -f "$1"; }
mkdir -p "$folder/client/.ssh"
key "$folder/client/.ssh/id_ed25519"

for number in 10 11; do
  home=/mnt/host-$number
  mkdir -p "$home/.ssh" "$home/tmp"
  chmod 700 "$home" "$home/.ssh"
  cp "$folder/client/.ssh/id_ed25519.pub" "$home/.ssh/authorized_keys"
  chmod 600 "$home/.ssh/authorized_keys"
  key "$home/host_key"
  # root's home is this machine's own here, and sshd has the user that it gives its rights up to
  { echo "root:x:0:0:root:$home:/bin/bash"; echo "sshd:x:74:74::/run/sshd:/usr/sbin/nologin"; grep -v '^root:\|^sshd:' /etc/passwd; } > "$home/passwd"
  cat > "$home/sshd_config" <<CONFIG
ListenAddress 10.77.0.$number
HostKey $home/host_key
AuthorizedKeysFile $home/.ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
SetEnv PATH=$PATH LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
CONFIG
  ip link add "veth$number" type veth peer name "host$number"
  ip link set "veth$number" master lab up
  unshare --net --pid --mount --fork --mount-proc --kill-child bash -c '
    set -e
    home=$1 number=$2
    mount --bind "$home/passwd" /etc/passwd
    mkdir -p /run/sshd
    mount -t tmpfs tmpfs /run/sshd
    chmod 755 /run/sshd
    mount --bind "$home/tmp" /tmp
    touch "$home/waiting"
    while ! ip link show "host$number" > /dev/null 2>&1; do sleep 0.1; done
    ip link set lo up
    ip addr add "10.77.0.$number/24" dev "host$number"
    ip link set "host$number" up
    ip route add default via 10.77.0.1   # Ray asks the routes which address is its own
    exec "$(command -v sshd)" -D -e -f "$home/sshd_config"
  ' machine "$home" "$number" > "$home/sshd.log" 2>&1 &
  until [ -e "$home/waiting" ]; do sleep 0.1; done
  ip link set "host$number" netns "$(pgrep -P $!)"
done

exec "$@"
