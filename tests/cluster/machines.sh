#!/usr/bin/env bash
# A laptop and hosts with sshd, each with its own network address, processes, name, /tmp, home folder and shared memory.
#   machines.sh laptop FOLDER HOSTS PATH...     in new net, pid, mount and uts namespaces; runs until its input ends
# FOLDER holds everything that is written; PATHs (Python, the package, shared storage) stay visible on every machine.
set -euo pipefail
here=$(realpath "${BASH_SOURCE[0]}")
kind=$1 folder=$2

private_files() { # own FOLDER, then the paths that stay visible
    local own=$1 mask path
    shift
    mount --make-rprivate /
    for mask in /tmp "$HOME"; do
        mkdir -p "$own$mask"
        for path in "$@"; do
            if [[ $path == "$mask"/* ]]; then
                mkdir -p "$own$path"
                mount --rbind "$path" "$own$path"
            fi
        done
        mount --rbind "$own$mask" "$mask"
    done
    chmod 1777 /tmp
    cp --recursive --no-target-directory /etc/skel "$HOME"
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /dev/shm
    printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$own/hosts"
    mount --bind "$own/hosts" /etc/hosts
    ip link set lo up
}

if [[ $kind == laptop ]]; then
    hosts=$3
    shift 3
    hostname laptop
    ip link add bridge0 type bridge
    ip address add 10.77.0.1/24 dev bridge0
    ip link set bridge0 up
    for number in $(seq 2 $((hosts + 1))); do
        mkdir -p "$folder/host$number"
        unshare --net --pid --mount --uts --fork --kill-child --mount-proc \
            bash "$here" host "$folder" "$number" "$@" >"$folder/host$number.log" 2>&1 &
        until [[ -e $folder/host$number/started ]]; do sleep 0.02; done
        ip link add "port$number" type veth peer name eth0 netns $!
        ip link set "port$number" master bridge0 up
    done
    private_files "$folder/laptop" "$folder" "$@"
    for number in $(seq 2 $((hosts + 1))); do
        until (exec 3<>"/dev/tcp/10.77.0.$number/22") 2>/dev/null; do sleep 0.05; done
    done
    touch "$folder/ready"
    exec cat
fi

number=$3
shift 3
hostname "host$number"
touch "$folder/host$number/started"
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip address add "10.77.0.$number/24" dev eth0
ip link set eth0 up
ip route add default via 10.77.0.1
private_files "$folder/host$number" "$folder/host$number" "$folder/sshd" "$@"
# Without this line sshd refuses an account whose password is locked.
printf 'root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n' >"$folder/host$number/shadow"
mount --bind "$folder/host$number/shadow" /etc/shadow
mkdir /run/sshd
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f "$folder/sshd/config"
