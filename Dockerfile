# One image for both services and the command line:
#   docker build -t modpressure .
#   docker run --rm modpressure modpressure version
# Behind a proxy or a mirror, pip takes its usual settings as build arguments: --build-arg PIP_INDEX_URL=...,
# HTTPS_PROXY=...; a certificate authority of one's own goes in as a secret: --secret id=ca,src=/path/to/ca.pem

ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY requirements.lock requirements-runtime.lock ./
# Two environments: one to build with, which stays here, and one to run with.
RUN --mount=type=secret,id=ca \
    if [ -f /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && python -m venv /opt/build && python -m venv /opt/modpressure \
    && /opt/modpressure/bin/pip install --quiet --require-hashes -r requirements-runtime.lock \
    && /opt/build/bin/pip install --quiet --require-hashes -r requirements.lock
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY protos protos
COPY modpressure modpressure
COPY loader_svc loader_svc
COPY stats_svc stats_svc
RUN /opt/build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/modpressure/bin/pip install --quiet --no-deps --no-index dist/*.whl \
    && /opt/modpressure/bin/pip uninstall --quiet --yes pip setuptools

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="modpressure" \
      org.opencontainers.image.description="See, predict and fix the memory that loading Linux kernel modules costs." \
      org.opencontainers.image.licenses="Apache-2.0"
# The directories belong to the user that runs, so that a volume or a tmpfs put there does too.
RUN useradd --system --uid 10001 --user-group --no-create-home --home-dir /data modpressure \
    && install -d -o modpressure -g modpressure /data /cache \
    && install -d /modules
COPY --from=build /opt/modpressure /opt/modpressure
ENV PATH=/opt/modpressure/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/cache \
    XDG_STATE_HOME=/data
USER 10001:10001
WORKDIR /data
CMD ["modpressure", "--help"]
