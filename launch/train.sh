#!/usr/bin/env bash
# Start a run on one or several nodes: torchrun with the environment that Megatron and NCCL need.
#
#   One node:       launch/train.sh --config FILE.yaml [section.key=value ...]
#   Several nodes:  the same command on every node, with
#                   NNODES=4 RDZV_ENDPOINT=first-node:29400 RUN_ID=merge-1 launch/train.sh --config FILE.yaml
#
# Settings, all from the environment:
#   NNODES          number of nodes (1)
#   NPROC_PER_NODE  ranks per node: a number, or `gpu` for one per GPU (`gpu`; 1 without a GPU)
#   RDZV_ENDPOINT   HOST:PORT of the rendezvous, which is served by the node with the name or address HOST
#   RUN_ID          name of the job: nodes with the same RUN_ID join each other (megatron_mopd)
#   MAX_RESTARTS    how often all ranks restart after one failed or a node came back (0, so that an error in the
#                   configuration ends the job at once); every restart resumes from the newest checkpoint in
#                   run_dir, so set checkpoint.save_interval too
#   NETWORK         network interface of the nodes' addresses, such as eth0 (chosen by the libraries)
#   JOIN_TIMEOUT    seconds that nodes wait for each other at the rendezvous (1800)
#   LOCAL_ADDR      this node's address, if its host name does not resolve on the other nodes
#   RDZV_CONF       further settings of the rendezvous, such as keep_alive_interval=2,keep_alive_max_attempt=3 (a node
#                   that is silent for the product, 15 s by default, counts as lost)
#   STOP_TIMEOUT    seconds for the ranks to finish their step and save after the launcher was asked to stop (870)
#   MOPD_JOB_SECRET secret with which the ranks authenticate each other: the same random text on every node, for
#                   example from `openssl rand -hex 32`; one node needs none. Not an argument, because every user of a
#                   node can read those. Without it, any process that reaches the rendezvous can end the job
#                   (docs/cluster.md)
#   MODULE          the module that every rank runs (megatron_mopd.train); megatron_mopd.commands.doctor examines the
#                   hosts and measures the network instead, with exactly the same launch
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
  # On GPUs before Blackwell, kernels then start in the order in which they were launched. Megatron launches a
  # tensor-parallel collective just before the matrix product that should hide it; with more queues the product
  # may occupy the GPU first and hide nothing. Does not affect results. A message between stages that must wait
  # then delays what is launched after it; plans are proven free of deadlock for any value (docs/pipeline.md, "One
  # hardware queue"). Set the variable to try other values.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # Responses differ in length, so tensor sizes change from step to step: expandable segments reduce the
  # allocator's fragmentation.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # NCCL prints one line if something is wrong. INFO shows the interfaces and transports that it chose.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
fi

# CPU threads per rank. torchrun would set 1 and print a long warning; with GPUs the CPU only launches kernels.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ -n ${NETWORK:-} ]]; then
  # The connections of NCCL, and of gloo, which carries small messages between hosts. For NCCL, a leading `=` means
  # exactly this interface (otherwise every one whose name has this prefix); gloo takes the bare name.
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$NETWORK}
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK}
fi

# Write output immediately instead of when a buffer is full, so that a killed rank's last output is in the log.
export PYTHONUNBUFFERED=1

# When asked to stop (SIGTERM, or SIGUSR1 from Slurm), torchrun forwards the signal, and the ranks finish their step
# and save. By default SIGUSR1 would end torchrun itself, and it would kill the ranks after 30 s. Ranks that are
# stopped because another one failed still get 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_TIMEOUT:-870}

arguments=(
  --nproc-per-node "${NPROC_PER_NODE:-$default_ranks}"
  --nnodes "$nnodes"
  --max-restarts "${MAX_RESTARTS:-0}"
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
)
if [[ -n ${RDZV_ENDPOINT:-} ]]; then
  # torchrun considers a node the endpoint's host if the node's name resolves to the same address. In many
  # containers and clouds it does not, and all nodes would wait for a server that none of them starts. In that case
  # compare with the node's actual addresses.
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
  # The ranks use a new store at every start. The store shared by torchrun's agents keeps its address from the
  # first start, and an agent that comes back later would wait for it in vain (torch 2.13).
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
  # The nodes join at the endpoint and are numbered there. With MAX_RESTARTS above 0, the others wait for the
  # replacement of a lost node (JOIN_TIMEOUT, seconds), and all restart.
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
