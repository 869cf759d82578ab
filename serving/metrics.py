"""Figures of a server, as Prometheus reads them: https://prometheus.io/docs/instrumenting."""

HELP = {
    "requests_total": ("counter", "requests answered, by status"),
    "prompt_tokens_total": ("counter", "tokens of prompts that were asked about"),
    "completion_tokens_total": ("counter", "tokens written"),
    "passes_total": ("counter", "passes of the engine"),
    "pass_seconds_total": ("counter", "seconds that these took: a token of each row"),
    "rows_waiting": ("gauge", "texts that wait for room"),
    "rows_running": ("gauge", "texts that are written now: the batch's size"),
    "seconds_per_token": ("histogram", "seconds from one token of a text to its next"),
}
BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def new_metrics():  # -> {(name, labels): number}
    return {("passes_total", ""): 0, ("pass_seconds_total", ""): 0.0}


def count(metrics, name, amount=1, labels=""):
    metrics[name, labels] = metrics.get((name, labels), 0) + amount


def observe(metrics, name, value, n=1):
    """n values of a histogram. Each bound counts all that are no larger."""
    for bound in BOUNDS:
        count(metrics, f"{name}_bucket", n * (value <= bound), f'{{le="{bound}"}}')
    count(metrics, f"{name}_bucket", n, '{le="+Inf"}')
    count(metrics, f"{name}_sum", n * value)
    count(metrics, f"{name}_count", n)


def render(metrics):  # -> the page's text
    lines = []
    for name, (kind, words) in HELP.items():
        samples = {name, *(f"{name}_{end}" for end in ("bucket", "sum", "count"))}
        found = [item for item in metrics.copy().items() if item[0][0] in samples]
        if found:
            lines += [f"# HELP sixtygpt_{name} {words}", f"# TYPE sixtygpt_{name} {kind}"]
            lines += [f"sixtygpt_{sample}{labels} {value}" for (sample, labels), value in found]
    return "\n".join(lines) + "\n"


class Counted:
    """ASGI middleware: counts the answers by their status."""

    def __init__(self, app, metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        async def send_counted(message):
            if message["type"] == "http.response.start":
                count(self.metrics, "requests_total", 1, f'{{status="{message["status"]}"}}')
            await send(message)

        await self.app(scope, receive, send_counted)
