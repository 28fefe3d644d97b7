#!/usr/bin/env bash
# pack.sh [FOLDER]: collects what a machine with a GPU and without Rust or a network needs. FOLDER is .gpu by default, which
# git ignores.
#
# Needs what `make kernels` needs. Wheels and the Vulkan loader's packages are for the second call and may be missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
limit=$((33 * 1000 * 1000))
wheels=(fla-core==0.6.0 einops==0.8.2)
loader=(libvulkan1 libglvnd0 libegl1 libgl1 libglx0 libgles2 libopengl0)

die() {
    echo "error: $*" >&2
    exit 1
}

[ -e "$root/Cargo.toml" ] || die "only a checkout can be packed, and $root is none"
folder=${1:-$root/.gpu}
# Only a folder of an earlier pack is emptied.
if [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ] && [ ! -e "$folder/commit" ]; then
    die "$folder is neither empty nor a pack; name another folder"
fi
rm -rf "$folder"
mkdir -p "$folder/kernels" "$folder/wheels" "$folder/loader" "$folder/gpu"
folder=$(cd "$folder" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git -C "$root" rev-parse HEAD >"$folder/commit"

make --no-print-directory -C "$root" kernels
cargo build --release --locked --manifest-path "$root/Cargo.toml"
program=${CARGO_TARGET_DIR:-$root/target}/release/kimi-linear
strip -o "$work/kimi-linear" "$program"
gzip -9 -n <"$work/kimi-linear" >"$folder/kimi-linear.gz"

# Cubins as files; PTX, the second try, in one archive.
cp "$root"/target/cuda/kernels/*.cubin "$folder/kernels/"
(cd "$root/target/cuda/kernels" && tar -cf - -- *.ptx) | gzip -9 -n >"$folder/ptx.tar.gz"

# The cases to run, checked on the CPU: a list that fails here would prove nothing on the GPU.
"$program" conformance --verbose --backend cpu >"$work/list" || die "the conformance list does not hold on this machine's CPU"
sed -nE 's/^(ok|skip) +//p' "$work/list" | sed -E 's/  .*//' >"$folder/names.txt"

for model in tiny-a tiny-128; do
    mkdir -p "$folder/models/$model"
    cp "$root/tests/reference/$model"/{*.json,*.jinja,tiktoken.model,model*.safetensors} "$folder/models/$model/"
done

cp "$root/.ci/gpu-check" "$folder/"
cp "$here"/{visit,cases,first,second}.sh "$here"/*.py "$here/predicted.json" "$folder/gpu/"

python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$folder/wheels" "${wheels[@]}" ||
    echo "warning: no wheels of ${wheels[*]}: fla will not run beside ours" >&2
download() { (cd "$folder/loader" && apt-get -qq download "${loader[@]}") 2>"$work/loader.err"; }
download || { apt-get -qq update && download; } >/dev/null 2>&1 ||
    echo "warning: no packages of the Vulkan loader; where the machine has none, wgpu is left out: $(tail -n 1 "$work/loader.err")" >&2

bytes=$(du -sb "$folder" | cut -f1)
[ "$bytes" -le "$limit" ] || die "$folder has $bytes bytes, and $limit are the most; its largest files: $(
    find "$folder" -type f -printf '%s %P\n' | sort -rn | head -4 | paste -sd, -
)"
echo "$folder: $bytes bytes, $(wc -l <"$folder/names.txt") cases, $(find "$folder/kernels" -type f | wc -l) cubins"
