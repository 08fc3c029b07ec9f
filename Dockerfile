# Images of trimtab. Each target holds one extra and its dependencies, pinned by constraints.txt; docs/images.md says more.
#
#   docker build --target model-server -t trimtab/model-server .         reward and reference
#   docker build --target generator | generator-vllm | trainer | web
#
# BASE is a Debian or Ubuntu whose python3 is 3.11 or later. torch brings CUDA's libraries itself, so no CUDA base is
# needed; for machines without GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG BASE=docker.io/library/debian:bookworm-slim

# What every image stands on: Python, certificates, a user who is not root.
FROM ${BASE} AS python
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /var/log/apt \
 && groupadd --gid 10001 trimtab \
 && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin trimtab \
 && mkdir -p /var/lib/trimtab /var/cache/trimtab \
 && chown 10001:10001 /var/lib/trimtab /var/cache/trimtab \
 && mkdir -p /usr/share/trimtab \
 && dpkg-query -W -f '${Package}\n' > /usr/share/trimtab/packages.txt
ENV PATH=/opt/trimtab/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    HOME=/home/trimtab \
    HF_HOME=/var/cache/trimtab/huggingface \
    TRITON_CACHE_DIR=/var/cache/trimtab/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/trimtab/inductor \
    CC=triton-cc

# Where environments are made: the only stage with pip and a compiler, and never part of an image.
FROM python AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv python3-dev gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/trimtab
ARG TORCH_INDEX=
ENV CC=gcc TORCH_INDEX=${TORCH_INDEX} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY clients/python/pyproject.toml ./clients/python/
COPY image ./image

# trimtab itself, apart from its dependencies: a change of code makes a layer of megabytes, not of gigabytes.
FROM build AS code
COPY README.md LICENSE NOTICE ./
COPY clients/python ./clients/python
COPY services ./services
COPY k8s ./k8s
RUN /opt/trimtab/bin/pip install --no-deps --prefix /opt/trimtab --root /out ./clients/python .

# The dependencies of each image.
FROM build AS model-server-python
RUN image/environment.sh reward reference s3
FROM build AS generator-python
RUN image/environment.sh generator s3
FROM build AS generator-vllm-python
RUN image/environment.sh vllm s3
FROM build AS trainer-python
RUN image/environment.sh trainer s3 k8s
FROM build AS web-python
RUN image/environment.sh labeling gateway postgres

# The model of examples/ with an untrained reward model beside it, for a system without a GPU and without a network.
# Whoever saves a model may alone read it; the services are another user.
FROM model-server-python AS tiny-models
COPY --from=code /out/opt/trimtab /opt/trimtab
COPY examples/models ./models
RUN python models/fresh_reward.py models/stories260K-hf models/stories260K-reward \
 && rm models/fresh_reward.py \
 && chmod -R a+rX models

FROM python AS final
ARG VERSION=0.1.0
ARG REVISION=
ARG CREATED=
ARG SOURCE=
LABEL org.opencontainers.image.title="trimtab" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.trimtab.sbom="/opt/trimtab/sbom.cdx.json" \
      org.trimtab.sbom.format="CycloneDX 1.6 JSON"
USER 10001:10001
WORKDIR /var/lib/trimtab
ENTRYPOINT ["trimtab"]

# The services open their probes' port; the check asks it.
FROM final AS service
ENV TRIMTAB_HEALTH_PORT=7200
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=4 CMD ["trimtab", "health", "127.0.0.1:7200"]

FROM service AS model-server
LABEL org.opencontainers.image.description="Reward and reference services of trimtab"
COPY --from=model-server-python /opt/trimtab /opt/trimtab
COPY --from=tiny-models /src/models /opt/trimtab/models
COPY --from=code /out/opt/trimtab /opt/trimtab

FROM service AS generator
LABEL org.opencontainers.image.description="Generator service of trimtab"
COPY --from=generator-python /opt/trimtab /opt/trimtab
COPY --from=tiny-models /src/models /opt/trimtab/models
COPY --from=code /out/opt/trimtab /opt/trimtab

FROM service AS generator-vllm
LABEL org.opencontainers.image.description="Generator service of trimtab on vLLM"
ENV TRIMTAB_ENGINE=vllm
COPY --from=generator-vllm-python /opt/trimtab /opt/trimtab
COPY --from=code /out/opt/trimtab /opt/trimtab

# Trainer, `trimtab job` and `trimtab rounds`. Who runs it says when it has ended; no port is open between runs.
FROM final AS trainer
LABEL org.opencontainers.image.description="Trainer and rounds of trimtab"
COPY --from=trainer-python /opt/trimtab /opt/trimtab
COPY --from=tiny-models /src/models /opt/trimtab/models
COPY --from=code /out/opt/trimtab /opt/trimtab
HEALTHCHECK NONE

FROM final AS web
LABEL org.opencontainers.image.description="Labeling page and gateway of trimtab"
COPY --from=web-python /opt/trimtab /opt/trimtab
COPY --from=code /out/opt/trimtab /opt/trimtab
EXPOSE 7110
HEALTHCHECK --interval=15s --timeout=5s --start-period=1m --retries=4 CMD ["trimtab", "health", "127.0.0.1:7110/healthz"]
