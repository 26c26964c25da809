#!/usr/bin/env bash
# Start a run on one node or on several: torchrun with the environment that Megatron and NCCL need.
#
#   One node:       launch/train.sh --config FILE.yaml [section.key=value ...]
#   Several nodes:  the same command on every node, with
#                   NNODES=4 RDZV_ENDPOINT=first-node:29400 RUN_ID=merge-1 launch/train.sh --config FILE.yaml
#
# Settings, all from the environment:
#   NNODES          number of nodes (1)
#   NPROC_PER_NODE  ranks per node: a number, or `gpu` for one per GPU (`gpu`; 1 where there is no GPU)
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous; the node whose name or address HOST is serves it
#   RUN_ID          name of the job: nodes with the same one find each other (megatron_mopd)
#   MAX_RESTARTS    how often all ranks start again after one failed or a node came back (0: a mistake in the
#                   configuration ends the job at once); every start continues from the newest checkpoint of
#                   run_dir, so set checkpoint.save_interval too
#   NETWORK         network interface of the nodes' addresses, such as eth0 (the libraries choose)
#   JOIN_TIMEOUT    seconds that nodes wait for each other at the rendezvous (1800)
#   LOCAL_ADDR      this node's address, when its host name does not resolve on the other nodes
#   RDZV_CONF       more settings of the rendezvous, such as keep_alive_interval=2,keep_alive_max_attempt=3 (a node
#                   that is silent for the product, 15 s by default, counts as lost)
#   STOP_TIMEOUT    seconds that ranks get to finish their step and save once the launcher was asked to stop (870)
#   MOPD_JOB_SECRET secret with which the ranks recognise each other: the same random text on every node, such as
#                   `openssl rand -hex 32` prints; one node needs none. Not an argument, which every user of a
#                   node can read. Without it, any process that reaches the rendezvous can end the job (docs/cluster.md)
#   MODULE          what every rank runs (megatron_mopd.train); megatron_mopd.commands.doctor examines the hosts
#                   and measures the network instead, with the very same launch
#   PYTHON          the interpreter (python)
set -euo pipefail

python=${PYTHON:-python}
nnodes=${NNODES:-1}

if [[ $nnodes != 1 && -z ${RDZV_ENDPOINT:-} ]]; then
  echo "error: NNODES=$nnodes needs RDZV_ENDPOINT=HOST:PORT, the same on every node" >&2
  exit 2
fi

has_gpu=false
if [[ $(nvidia-smi --list-gpus 2>/dev/null || true) == *GPU* ]]; then
  has_gpu=true
fi
$has_gpu && default_ranks=gpu || default_ranks=1

if $has_gpu; then
  # GPUs before Blackwell: kernels start in the order in which they were launched. Megatron launches a
  # tensor-parallel collective just before the matrix product that should hide it; with more queues the
  # product may take the GPU first and hide nothing. Results do not depend on it. Set another value to try.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # Responses differ in length, so tensor sizes change from step to step: growing segments instead of fixed
  # blocks keep the allocator's unused leftovers small.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # One line from NCCL when something is wrong. INFO shows the interfaces and transports that it chose.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
fi

# CPU threads of a rank. torchrun would set 1 and say so at length; on GPU the CPU only launches kernels.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ -n ${NETWORK:-} ]]; then
  # NCCL's connections, and gloo's, which carries small messages between hosts. `=` in front means this very
  # interface for NCCL (without, every one whose name begins so); gloo takes the bare name.
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$NETWORK}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK}
fi

# Output shows at once, not when a buffer is full: a killed rank's last words are then in the log.
export PYTHONUNBUFFERED=1

# Asked to stop (SIGTERM, or SIGUSR1 from Slurm), torchrun passes the signal on, and the ranks finish their step and
# save. It would end at SIGUSR1 itself, and kill the ranks after 30 s. Ranks that are stopped because another one
# failed still get 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT:-870}

arguments=(
  --nproc-per-node "${NPROC_PER_NODE:-$default_ranks}"
  --nnodes "$nnodes"
  --max-restarts "${MAX_RESTARTS:-0}"
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
)
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
  # torchrun takes a node for the endpoint's host when the node's name resolves to the same address. In many
  # containers and clouds it does not, and all nodes wait for a server that nobody starts: there the addresses
  # that the node really has decide.
  host=${RDZV_ENDPOINT%:*}
  addresses() { getent ahosts "$1" 2>/dev/null | cut -d ' ' -f 1 | sort -u || true; }
  known=" $(addresses "$(hostname)" | tr '\n' ' ')"
  own=" $(hostname -I 2>/dev/null || true) ${LOCAL_ADDR:-} "
  serves=""
  for address in $(addresses "$host"); do
    if [[ $own == *" $address "* && $known != *" $address "* ]]; then
      serves=",is_host=true"
    fi
  done
  # The ranks' own meeting point is a new one at every start. The one that torchrun's agents share keeps its
  # address from the first start, and an agent that comes back later waits for it in vain (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  # The nodes meet at the endpoint and are numbered there. With MAX_RESTARTS above 0, the others wait
  # for the replacement of a lost node (JOIN_TIMEOUT, seconds), and all start again.
  arguments+=(
    --rdzv-backend c10d
    --rdzv-endpoint "$RDZV_ENDPOINT"
    --rdzv-id "${RUN_ID:-megatron_mopd}"
    --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-1800}$serves${RDZV_CONF:+,$RDZV_CONF}"
  )
  [[ -n ${LOCAL_ADDR:-} ]] && arguments+=(--local-addr "$LOCAL_ADDR")
else
  arguments+=(--standalone)
fi

exec "$python" -m megatron_mopd.commands.elastic "${arguments[@]}" -m "${MODULE:-megatron_mopd.train}" "$@"
