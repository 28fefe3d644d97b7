# An image that serves a model to OpenAI's clients:
#
#   docker build --tag kimi-linear .
#   docker run --rm -p 8000:8000 -v MODELS:/models kimi-linear --model /models/MODEL.gguf --api-key KEY
#
# Without --model it serves the demo model. For an NVIDIA GPU add `--gpus all` and mount a folder of compiled kernels (`make kernels`) as
# /usr/local/bin/kernels; for others pass the device (`--device /dev/dri`).
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin kimi-linear && strip -o /kimi-linear target/release/kimi-linear

FROM debian:bookworm-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libvulkan1 mesa-vulkan-drivers \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home kimi
COPY --from=build /kimi-linear /usr/local/bin/kimi-linear
USER kimi
EXPOSE 8000
# Inside a container 127.0.0.1 is the container's own. Give --api-key where others can reach the port.
ENTRYPOINT ["kimi-linear", "serve", "--host", "0.0.0.0", "--port", "8000"]
