# The images of `baton render` (docs/kubernetes.md):
#
#   docker build --target worker -t registry.example/baton-worker:1 .
#   docker build --target orchestrator -t registry.example/baton-orchestrator:1 .
#
# Workers are vLLM's image with Baton in it; orchestrators need neither vLLM nor a GPU.
ARG PYTHON_IMAGE=python:3.12-slim
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# The wheel twice: with compiled modules for the orchestrator, which has this stage's Python; pure for the
# worker, whose Python is vLLM's.
FROM ${PYTHON_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY configs configs
COPY orchestrator orchestrator
COPY worker worker
COPY launch launch
RUN BATON_COMPILE=0 pip wheel --no-cache-dir --no-deps -w /wheels/pure . \
    && rm -rf build *.egg-info \
    && BATON_COMPILE=1 pip wheel --no-cache-dir --no-deps -w /wheels/compiled .

FROM ${VLLM_IMAGE} AS worker
COPY --from=build /wheels/pure /wheels
# NIXL hands KV caches over; most of vLLM's images have it.
RUN python3 -m pip install --no-cache-dir "$(ls /wheels/*.whl)[kv-events,otel]" \
    && (python3 -c 'import nixl' || python3 -m pip install --no-cache-dir 'nixl>=1.5,<2') \
    && rm -rf /wheels
# It owns nothing: what workers write is in volumes. Some libraries ask for the name of the user.
RUN useradd --uid 10001 --no-create-home baton
USER 10001:10001
ENV HOME=/tmp
WORKDIR /tmp
ENTRYPOINT []
CMD ["baton", "--help"]

FROM ${PYTHON_IMAGE} AS orchestrator
COPY --from=build /wheels/compiled /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[kv-events,otel]" && rm -rf /wheels
RUN useradd --uid 10001 --no-create-home baton
USER 10001:10001
ENV HOME=/tmp
WORKDIR /tmp
ENTRYPOINT []
CMD ["baton", "--help"]
