#!/usr/bin/env bash
# A real SLURM cluster on one machine: a controller and two nodes, each with its own network, host name and processes.
#
#   setpriv --pdeathsig KILL unshare --net --uts --mount --pid --fork --kill-child --mount-proc cluster.sh DIR
#
# So started, this is the first process of the controller's PID namespace, and the nodes' namespaces lie inside it:
# whoever kills it, or its parent, takes down daemons, jobs and networks together. In DIR, which must be new, are
# slurm.conf, the logs, and `ready` once both nodes can work. The network has no way out.
set -euo pipefail

dir=$1 role=${2:-controller} name=${3:-ctl}
export SLURM_CONF=$dir/slurm.conf
hostname "$name"
ip link set lo up

if [ "$role" = node ]; then
    mount --bind "$dir/hosts" /etc/hosts
    mount -t tmpfs tmpfs /dev/shm
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done # the controller lays the cable
    ip addr add "10.77.0.${name/n/1}/24" dev eth0
    ip link set eth0 up
    slurmd -D -N "$name" >"$dir/slurmd-$name.out" 2>&1 &
    wait # as the first process here, bash buries the orphans
    exit 1
fi

mkdir -p "$dir"/{state,spool-n1,spool-n2,munge}
chmod 700 "$dir/munge"
printf '%s\n' '127.0.0.1 localhost' '10.77.0.1 ctl' '10.77.0.11 n1' '10.77.0.12 n2' >"$dir/hosts"
cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits, 120 s unless said.
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
# The plugins that ask nothing of the machine: no cgroups, no accounting, no binding to cores.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
# More cores than there are may be promised.
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
NodeName=n1 NodeAddr=10.77.0.11 NodeHostname=n1 CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeAddr=10.77.0.12 NodeHostname=n2 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END

mount --bind "$dir/hosts" /etc/hosts
ip link add bridge type bridge
ip addr add 10.77.0.1/24 dev bridge
ip link set bridge up

# A Unix socket is reached through the file system, so that all machines share one munged.
head -c 128 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
munged --foreground --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
    --seed-file="$dir/munge/seed" --log-file="$dir/munged.log" >"$dir/munged.out" 2>&1 &
until [ -S "$dir/munge/socket" ]; do sleep 0.02; done
chmod 711 "$dir/munge"
slurmctld -D >"$dir/slurmctld.out" 2>&1 &

for node in n1 n2; do
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc "$0" "$dir" node "$node" &
    until [ "$(readlink /proc/$!/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
    ip link add "to-$node" type veth peer name eth0 netns $!
    ip link set "to-$node" master bridge up
done

until [ "$(sinfo --noheader --states idle --format %D 2>/dev/null)" = 2 ]; do sleep 0.1; done
touch "$dir/ready"
wait
exit 1
