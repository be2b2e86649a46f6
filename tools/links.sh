#!/usr/bin/env bash
# Two "hosts" on this machine, joined by a link of a given rate: network namespaces NAME-0 and NAME-1
# with the addresses 10.77.0.1 and 10.77.0.2. For measurements and tests of a slow network. Needs
# root and iproute2.
#
#   tools/links.sh up NAME MBIT             make them; MBIT 0: as fast as the machine is
#   tools/links.sh exec NAME HOST COMMAND   run a command on host 0 or 1
#   tools/links.sh down NAME                remove them
#
# For a job of two ranks, one on each host:
#   tools/links.sh up slow 200
#   for rank in 0 1; do
#     tools/links.sh exec slow $rank env RANK=$rank WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 \
#       MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 distmoe doctor comm &
#   done; wait
#   tools/links.sh down slow
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

down() {
  for host in 0 1; do
    if ip netns list | grep -qE "^$1-$host( |$)"; then ip netns del "$1-$host"; fi
  done
}

up() {
  local name=$1 mbit=$2
  trap 'down "$name"' ERR
  ip netns add "$name-0"
  ip netns add "$name-1"
  ip link add link0 netns "$name-0" type veth peer name link0 netns "$name-1"
  for host in 0 1; do
    local inside=(ip netns exec "$name-$host")
    "${inside[@]}" ip addr add "10.77.0.$((host + 1))/24" dev link0
    "${inside[@]}" ip link set link0 up
    "${inside[@]}" ip link set lo up
    if [ "$mbit" != 0 ]; then
      # A queue that never drops: TCP would wait for retransmissions, not for the rate.
      "${inside[@]}" tc qdisc add dev link0 root tbf rate "${mbit}mbit" burst 128k limit 16000000
    fi
  done
}

case "${1:-}:$#" in
  up:3) up "$2" "$3" ;;
  down:2) down "$2" ;;
  exec:*)
    [ $# -ge 4 ] || usage
    name=$2 host=$3
    shift 3
    exec ip netns exec "$name-$host" env GLOO_SOCKET_IFNAME=link0 "$@"
    ;;
  *) usage ;;
esac
