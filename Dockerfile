# Distroless python3-debian13 serves as well: nothing here needs a shell.
ARG BASE=python:3.13-slim

# An image whose tests fail cannot be built. These open no socket and wait for nothing:
# the others have deadlines, and a slow or emulated builder would fail them.
FROM ${BASE} AS tested
USER 0
WORKDIR /app
COPY --chmod=755 . .
RUN ["python3", "-m", "compileall", "-q", "-b", "/app/health_check.py"]
USER 65532:65532
RUN ["python3", "-m", "unittest", \
     "test_health_check.Documentation", "test_health_check.Vocabulary", \
     "test_health_check.PromQL", "test_health_check.Evaluate", \
     "test_health_check.Rules", "test_health_check.Servers", \
     "test_health_check.Config", "test_health_check.Exposition", \
     "test_health_check.Absence", "test_health_check.HistoryTest"]

FROM ${BASE}
LABEL org.opencontainers.image.title="health_check.py" \
      org.opencontainers.image.description="Prometheus alert rules as a Kubernetes readiness probe" \
      org.opencontainers.image.version="1.0.0" \
      org.opencontainers.image.licenses="MIT"
WORKDIR /app
COPY --from=tested --chmod=444 /app/health_check.py /app/health_check.pyc /app/LICENSE ./
# Both bases come without byte code of the standard library, and nobody can write any
# later: without this run, each start and each probe would compile it again.
USER 0
RUN ["python3", "-I", "health_check.pyc", "--version"]
USER 65532:65532
EXPOSE 8081
STOPSIGNAL SIGTERM
# /livez is about this process only: Docker's verdict must not follow the server's load.
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s \
    CMD ["python3", "-I", "/app/health_check.pyc", "--probe", "/livez"]
# -I keeps PYTHON* variables and stray modules out; it drops PYTHONUNBUFFERED too, hence -u.
# Without a look at site-packages (-S) it is up 3 ms sooner.
ENTRYPOINT ["python3", "-I", "-S", "-u", "/app/health_check.pyc"]
