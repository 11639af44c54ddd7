#!/usr/bin/env bash
# Pack vLLM 0.33.0 (CUDA 13, Python 3.12, x86-64) with torch 2.14.0, Triton 3.8.0 and NCCL 2.30.7 for a machine that has a Hopper GPU
# (H100, H200) but no package registry. It makes five pieces of at most 55 MiB, about 290 MB in all.
#
#   pack_vllm.sh OUT [BYTES]      makes OUT/00/vllm.part.00, OUT/01/vllm.part.01, ... and OUT/unpack.sh; BYTES is the size of a piece
#
# On the GPU machine, with all pieces in one folder:
#   bash unpack.sh PIECES SITE
#   export PYTHONPATH=SITE VLLM_USE_FLASHINFER_SAMPLER=0
#
# That machine needs Python 3.12 with torch 2.11 or newer for CUDA 13.0 (for the NVIDIA libraries: all but NCCL are new enough there),
# transformers from 5.16.1 to before 5.21, numpy, numba, uvloop and the other usual packages of such an image, and a C compiler.
# The script here needs Python 3 with pip, strip, xz, tar, 8 GB of disk and 3 GB of memory; it takes about ten minutes on two cores.
#
# What is left out: GPU code for other cards than Hopper (its bytes become zeros, its headers stay), symbol tables and debug data,
# FlashAttention 2, the Rust front end, DeepGEMM, FlashMLA and other kernels that a dense model on Hopper does not use, FlashInfer, Triton's
# profiler, cuDNN 9.24 (torch refuses to use the older one; a language model does not need it).
set -euo pipefail
out=$(realpath -m "$1") bytes=${2:-57671680}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
site=$work/site wheels=$work/wheels
mkdir -p "$out" "$site" "$wheels"

# 1. Fetch and unpack.
tags=(--only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for n in 2_39 2_38 2_37 2_36 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_18 2_17 2_12 2_5; do tags+=(--platform "manylinux_${n}_x86_64"); done
tags+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
while read -r requirement; do
  python3 -m pip download -q --no-deps "${tags[@]}" -d "$wheels" "$requirement"
done < <(printf '%s\n' vllm==0.33.0 torch==2.14.0 triton==3.8.0 nvidia-nccl-cu13==2.30.7; cat "$here/pack_vllm.txt")
python3 -m pip install -q --no-index --no-deps --no-compile "${tags[@]}" --target "$site" "$wheels"/*.whl
rm -r "$wheels"

# 2. Leave out what Hopper does not need.
cd "$site"
rm -rf torch/bin/protoc* torch/share torch/test nvidia/nccl/include nvidia/nccl/lib/*.bc
rm -rf vllm/vllm_flash_attn/_vllm_fa2_C* vllm/vllm-rs vllm/third_party/{deep_gemm,fmha_sm100} vllm/_{flashmla,flashkda,qutlass,deepselect}*
rm -rf triton/{instrumentation,plugins,FileCheck} triton/_C/libproton.so triton/backends/amd/include/hip
rm -rf triton/backends/nvidia/bin/{ptxas-blackwell,nvdisasm,cuobjdump} triton/backends/nvidia/lib/cupti*
find . \( -name '*.a' -o -name direct_url.json \) -delete
big=(vllm/_C_stable_libtorch.abi3.so vllm/_moe_C_stable_libtorch.abi3.so vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so nvidia/nccl/lib/libnccl.so.2)
for f in torch/lib/*.so triton/_C/libtriton.so "${big[@]}"; do strip --strip-unneeded "$f"; done

# 3. Zero the GPU code of other cards. A library holds containers, each with one entry a kind of card; the driver reads the entry that fits.
python3 - 90 torch/lib/libtorch_cuda.so torch/lib/libtorch_cuda_linalg.so torch/lib/libtorch_nvshmem.so "${big[@]}" <<'PY'
import mmap, struct, sys

def keep(entries, want):
    """Entries worth keeping of one container: code for the card, else its newest PTX that the card can still compile."""
    code = [e for e in entries if e[0] == 2 and e[1] == want]
    ptx = [e for e in entries if e[0] == 1 and e[1] <= want]
    return code or ptx[-1:]

def slim(path, want):
    saved = 0
    with open(path, "r+b") as f, mmap.mmap(f.fileno(), 0) as b:
        shoff, = struct.unpack_from("<Q", b, 0x28)
        size, count, names = struct.unpack_from("<HHH", b, 0x3A)
        table = [struct.unpack_from("<IIQQQQIIQQ", b, shoff + i * size) for i in range(count)]
        for section in table:
            start = table[names][4] + section[0]
            name = bytes(b[start:b.find(b"\0", start)])
            if name not in (b".nv_fatbin", b"__nv_relfatbin"):
                continue
            p, end = section[4], section[4] + section[5]
            while p < end:
                magic, _, header, length = struct.unpack_from("<IHHQ", b, p)
                if magic != 0xBA55ED50:
                    p += 8
                    continue
                entries, q, stop = [], p + header, p + header + length
                while q < stop:
                    kind, _, head, body = struct.unpack_from("<HHIQ", b, q)
                    entries.append((kind, struct.unpack_from("<I", b, q + 28)[0], q + head, body))
                    q += head + body
                kept = [] if name == b"__nv_relfatbin" else keep(entries, want)
                for e in entries:
                    if e not in kept:
                        b[e[2]:e[2] + e[3]] = bytes(e[3])
                        saved += e[3]
                p = stop
    print(path, saved >> 20, "MiB zeroed")

for path in sys.argv[2:]:
    slim(path, int(sys.argv[1]))
PY

# 4. Compress: machine code with the x86 filter, the rest without. Blocks let several cores unpack.
pack() { tar --owner=0 --group=0 --sort=name -c "${@:2}" | xz -T2 --block-size="$1"MiB "${filter[@]}"; }
code=(torch/lib torch/bin torch/_C.cpython-312-x86_64-linux-gnu.so nvidia/nccl triton/_C triton/backends/nvidia/bin/ptxas)
code+=(vllm/_C_stable_libtorch.abi3.so)
fa3=vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
{
  filter=(--x86 --lzma2=preset=9); pack 128 "${code[@]}"
  filter=(-9); pack 96 "$fa3"
  pack 96 --anchored "${code[@]/#/--exclude=./}" --exclude="./$fa3" .
} | split -b "$bytes" -d - "$work/vllm.part."
for f in "$work"/vllm.part.*; do mkdir -p "$out/${f##*.}"; mv "$f" "$out/${f##*.}/"; done

cat > "$out/unpack.sh" <<'UNPACK'
#!/usr/bin/env bash
# unpack.sh PIECES SITE: joins the pieces vllm.part.NN in the folder PIECES and unpacks them into the folder SITE.
# The NVIDIA libraries that did not travel are linked from the Python environment of this machine. Afterwards:
#   export PYTHONPATH=SITE VLLM_USE_FLASHINFER_SAMPLER=0
set -euo pipefail
pieces=$1 site=$(realpath -m "$2")
mkdir -p "$site"
cat "$pieces"/vllm.part.* | xz -dc -T8 | tar -xi --no-same-owner -C "$site"
installed=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for folder in "$installed"/nvidia/*/; do
  name=$(basename "$folder")
  [ -e "$site/nvidia/$name" ] || ln -s "${folder%/}" "$site/nvidia/$name"
done
UNPACK
du -b "$out"/*/*
