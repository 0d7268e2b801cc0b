"""Local data: episodes of hand-written controllers in the real physics, for all eight Bullet tasks.

Where the public DSRL files cannot be had these data take their place: well spread in return and cost, never past
DSRL's reference maximum. Every episode belongs to a kind (safe, mid, risky, ...), kinds are dealt by fixed quota, and
an episode depends on (seed, stream, its number) alone: the same bytes come out whatever the number of workers.

A controller is `control(obs) -> action`, made by `<body>_<course>(p)` from parameters `p` that are drawn per episode:
a number is a constant, a pair a uniform range, a list a choice. Actions get AR(1) noise, n <- .7 n + .714 sigma eps.
Smooth controllers matter: learners cannot stay safe on data from bang-bang ones.
"""

from __future__ import annotations

import math
from math import atan2, cos, hypot, pi, sin

import numpy as np

from saferule import simulator
from saferule.errors import UserError
from saferule.tasks import TASKS, Task, get_task

# ------------------------------------------------------------------------------------------------------- controllers


def clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def wrap(angle: float) -> float:
    return (angle + pi) % (2 * pi) - pi


def waypoint(x: float, y: float, p: dict) -> tuple[float, float]:
    """Unit vector to the point `look` rad ahead, clockwise, on the circle of radius R cut off at |x| = X."""
    theta = atan2(y, x) - p["look"]
    r = min(p["R"], p["X"] / max(abs(cos(theta)), 1e-6))
    dx, dy = r * cos(theta) - x, r * sin(theta) - y
    d = max(hypot(dx, dy), 1e-6)
    return dx / d, dy / d


def ball_circle(p):  # action = force along x, y
    def control(o):
        x, y, vx, vy = 10 * o[0], 10 * o[1], 5 * o[2], 5 * o[3]
        dx, dy = waypoint(x, y, p)
        return p["kp"] * (p["v"] * dx - vx), p["kp"] * (p["v"] * dy - vy)

    return control


def ball_run(p):
    def control(o):
        y, vx, vy = 10 * o[1], 5 * o[2], 5 * o[3]
        return p["kp"] * (p["v"] - vx), p["ky"] * (p["y"] - y) - 0.8 * p["ky"] * vy

    return control


def car_drive(o, v, heading, p):  # action = wheel speed, steering angle; the car drives backwards, motor < 0
    yaw = atan2(o[4], o[5]) + pi
    forward = o[2] * cos(yaw) + o[3] * sin(yaw)
    return -(p["ff"] * v + p["kp"] * (v - forward)), -p["ks"] * wrap(heading - yaw)


def car_circle(p):
    def control(o):
        dx, dy = waypoint(10 * o[0], 10 * o[1], p)
        return car_drive(o, p["v"], atan2(dy, dx), p)

    return control


def car_run(p):
    def control(o):
        x, y = 10 * o[0], 10 * o[1]
        v = p["v"] if x < p["x_slow"] else p["v_slow"]
        return car_drive(o, v, clip(p["ky"] * (p["y"] - y), -0.8, 0.8), p)

    return control


def drone_fly(o, ax, ay, p):  # action = speed of the four rotors; ax, ay: wanted acceleration
    qx, qy, qz, qw = o[6:10]
    roll = atan2(2 * (qw * qx + qy * qz), 1 - 2 * (qx * qx + qy * qy))
    pitch = math.asin(clip(2 * (qw * qy - qz * qx), -1, 1))
    yaw = atan2(2 * (qw * qz + qx * qy), 1 - 2 * (qy * qy + qz * qz))
    c, s = cos(yaw), sin(yaw)
    wx, wy, wz = 10 * o[10], 10 * o[11], 10 * o[12]
    tilt = p["tilt"]
    pitch_wanted = clip((c * ax + s * ay) / 9.81, -tilt, tilt)
    roll_wanted = clip(-(c * ay - s * ax) / 9.81, -tilt, tilt)
    up = p["kz"] * (p["z"] - 10 * o[2]) - p["kvz"] * 5 * o[5]
    pt = p["ka"] * (pitch_wanted - pitch) - p["kd"] * (c * wy - s * wx)
    rt = p["ka"] * (roll_wanted - roll) - p["kd"] * (c * wx + s * wy)
    yt = -p["kyaw"] * wz
    return up - pt - yt, up - rt + yt, up + pt - yt, up + rt + yt


def drone_circle(p):
    def control(o):
        x, y, vx, vy = 10 * o[0], 10 * o[1], 5 * o[3], 5 * o[4]
        dx, dy = waypoint(x, y, p)
        ax, ay = p["kv"] * (p["v"] * dx - vx), p["kv"] * (p["v"] * dy - vy)
        r = max(hypot(x, y), 1e-6)
        if p["R"] < p["X"] * r / max(abs(x), 1e-6):  # on the round part: centripetal feed-forward
            pull = p["ff"] * (vx * vx + vy * vy) / (p["R"] * r)
            ax, ay = ax - pull * x, ay - pull * y
        past = abs(x) + p["tb"] * math.copysign(vx, x * vx) - p["X"]  # where the drone will be if it does not brake
        if past > 0:
            ax -= p["kx"] * math.copysign(past, x)
        return drone_fly(o, ax, ay, p)

    return control


def drone_run(p):
    def control(o):
        y, vx, vy = 10 * o[1], 5 * o[3], 5 * o[4]
        return drone_fly(o, p["kv"] * (p["v"] - vx), p["kv"] * (p["ky"] * (p["y"] - y) - vy), p)

    return control


ALPHA = np.deg2rad([45.0, 135.0, 225.0, 315.0])  # azimuths of the ant's legs
PSI = np.array([0.0, pi, 0.0, pi])  # phases of a trot
ANKLE = np.array([1.0, -1.0, -1.0, 1.0])  # signs of the ankle joints
GAIT = ("f", "Ah", "fl0", "Aa", "dl", "kph", "kdh", "kpa", "kda", "Ar", "dr", "duty", "h0", "By")
RUN_SAFE = (.999, 1.096, .517, .213, 1.372, .425, .603, 1.386, 1.050, -.003, -1.418, -.009, .227, .497)
RUN_FAST = (1.560, 1.185, .648, .258, .431, .673, .770, 1.256, .746, .173, -1.432, .180, .318, .634)
CIRCLE_ROBUST = (1.601, 1.701, -.094, .918, .232, .498, .306, 1.035, .480, .585, .037, -.855, -.026, -.028)
CIRCLE_FAST = (1.583, 1.826, -.255, 1.296, .222, .878, .584, 1.092, .322, .791, .279, -.652, -.064, -.212)


def ant_walk(p, slow, fast, dt):
    """Omnidirectional trot: returns walk(o, heading, yaw_wanted) -> torques of hip 1, ankle 1, ... ankle 4."""
    g = {k: (1 - p["w"]) * a + p["w"] * b for k, a, b in zip(GAIT, slow, fast)}
    phase = p["theta0"]
    action = np.empty(8)

    def walk(o, heading, yaw_wanted):
        nonlocal phase
        qx, qy, qz, qw = o[6:10]
        yaw = atan2(2 * (qw * qz + qx * qy), 1 - 2 * (qy * qy + qz * qz))
        joints = 2 * o[13:29]
        q, v = joints[0::2], joints[1::2]
        phase += 2 * pi * g["f"] * dt
        ph = phase + PSI
        ph = ph + g["duty"] * np.sin(ph)
        phi = (heading - yaw) - ALPHA
        d, c = -math.sqrt(2) * np.sin(phi), math.sqrt(2) * np.cos(phi)
        turn = clip(-g["By"] * wrap(yaw_wanted - yaw), -0.5, 0.5)
        hip = (g["Ah"] * p["amp"] * d + turn) * np.sin(ph) + g["h0"] * d
        flex = g["fl0"] + g["Aa"] * np.sin(ph + g["dl"]) + g["Ar"] * p["amp"] * c * np.sin(ph + g["dr"])
        action[0::2] = g["kph"] * (hip - q[0::2]) - g["kdh"] * v[0::2]
        action[1::2] = ANKLE * (g["kpa"] * (flex - ANKLE * q[1::2]) - g["kda"] * ANKLE * v[1::2])
        return np.clip(action, -1, 1)

    return walk


def ant_run(p):
    walk = ant_walk(p, RUN_SAFE, RUN_FAST, dt=1 / 30)
    return lambda o: walk(o, clip(p["ky"] * (p["y"] - 10 * o[1]), -0.8, 0.8), 0.0)


def ant_circle(p):
    walk = ant_walk(p, CIRCLE_ROBUST, CIRCLE_FAST, dt=1 / 10)

    def control(o):
        dx, dy = waypoint(10 * o[0], 10 * o[1], p)
        heading = atan2(dy, dx)
        return walk(o, heading, heading)

    return control


# ------------------------------------------------------------- kinds: quota and what differs from the common parameters
# (v speed, X and R the course, y the lane, sigma the noise, the rest gains)

PLANS = {
    "BallRun": (ball_run, dict(
        kp=(0.3, 0.8), ky=(0.3, 0.8), y=(-1, 1), sigma=(0.05, 0.3)), {
        "safe": (0.60, dict(v=(1.0, 2.4))),
        "mid": (0.20, dict(v=(2.4, 4.0))),
        "risky": (0.15, dict(v=(4.0, 8.0))),
        "drift": (0.05, dict(v=(1.0, 4.0), y=[-5, -4, -3, 3, 4, 5])),
    }),
    "BallCircle": (ball_circle, dict(
        kp=(0.2, 0.5), v=(3, 7.5), look=(0.2, 0.45), R=(6.3, 7.3), sigma=(0.1, 0.5)), {
        "safe": (0.50, dict(X=(4.6, 5.8))),
        "mid": (0.20, dict(X=(5.6, 6.5))),
        "risky": (0.20, dict(X=(6.5, 9.0))),
        "slow": (0.10, dict(X=(3.0, 9.0), v=(0.3, 3.0), R=(3.0, 8.0))),
    }),
    "CarRun": (car_run, dict(
        ff=0.265, kp=(0.3, 0.7), ks=(0.8, 2.0), ky=(0.3, 0.8), y=(-1, 1), x_slow=99, v_slow=0, sigma=(0.02, 0.25)), {
        "safe": (0.55, dict(v=(0.8, 1.45))),
        "mid": (0.20, dict(v=(1.42, 1.52))),
        "risky": (0.20, dict(v=(1.8, 2.8), x_slow=(6.0, 8.5), v_slow=(0.1, 0.5))),  # a sprint, within DSRL's returns
        "drift": (0.05, dict(v=(0.8, 1.6), y=[-4, -3, 3, 4])),
    }),
    "CarCircle": (car_circle, dict(
        ff=0.37, kp=(0.2, 0.5), ks=(1.0, 2.0), v=(1.5, 3.8), look=(0.2, 0.45), R=(6.3, 7.3), sigma=(0.05, 0.5)), {
        "safe": (0.50, dict(X=(4.2, 5.3))),
        "mid": (0.20, dict(X=(5.2, 6.2))),
        "risky": (0.20, dict(X=(6.5, 9.0))),
        "slow": (0.10, dict(X=(3.0, 9.0), v=(0.3, 1.5), R=(3.0, 8.0))),
    }),
    "DroneRun": (drone_run, dict(
        tilt=0.4, ka=2, kd=0.8, kz=1, kvz=1, kyaw=0.3, z=(0.8, 1.5), kv=(1.5, 2.5), ky=(0.5, 1.2), y=(-1, 1),
        sigma=[0.05, 0.1, 0.2]), {
        "safe": (0.50, dict(v=(0.6, 1.25))),
        "mid": (0.20, dict(v=(1.2, 1.6))),
        "risky": (0.20, dict(v=(1.8, 3.3))),
        "drift": (0.10, dict(v=(0.6, 1.3), y=[-6, -5, -4, -3, 3, 4, 5, 6])),
    }),
    "DroneCircle": (drone_circle, dict(
        tilt=0.472, ka=1.238, kd=0.439, kz=0.665, kvz=1.343, kyaw=0.3, z=1.5, kv=0.855, look=0.391, ff=0.929,
        kx=1.022, tb=0.155, v=(2.5, 4.4), R=(6.5, 7.05), sigma=[0.02, 0.05, 0.1]), {
        "safe": (0.40, dict(X=(4.7, 5.2))),
        "mid": (0.20, dict(X=(5.2, 5.8))),
        "risky": (0.30, dict(X=9, v=(3.5, 5.5))),
        "slow": (0.10, dict(X=(3, 9), v=(0.5, 2), R=(3, 8))),
    }),
    "AntRun": (ant_run, dict(
        theta0=(0, 2 * pi), amp=(0.4, 1.1), ky=0.4, y=(-1, 1), sigma=[0.02, 0.05, 0.1, 0.2]), {
        "safe": (0.45, dict(w=(0, 0.15))),
        "mid": (0.20, dict(w=(0.15, 0.5))),
        "risky": (0.25, dict(w=(0.7, 1), amp=(0.8, 1.1))),
        "drift": (0.10, dict(w=(0, 1), amp=(0.8, 1.1), ky=0.6, y=[-8, -7, -6, -5, -4, 4, 5, 6, 7, 8])),
    }),
    "AntCircle": (ant_circle, dict(
        theta0=(0, 2 * pi), amp=(0.85, 1.1), look=(0.2, 0.4), R=(6.3, 7.3), w=0, sigma=[0.02, 0.05, 0.1, 0.2]), {
        "safe": (0.45, dict(X=(4.9, 5.7))),
        "mid": (0.20, dict(X=(5.6, 6.3))),
        "risky": (0.25, dict(X=(6.5, 9), w=(0, 0.5))),
        "slow": (0.10, dict(X=(3, 9), R=(2, 8), amp=(0.2, 0.8))),
    }),
}
STREAMS = {"default": 0, "risky": 1}


def draw(ranges: dict, rng: np.random.Generator) -> dict[str, float]:
    """One value per parameter: a pair is a uniform range, a list a choice, a number itself."""
    p = {}
    for name, value in ranges.items():
        if isinstance(value, tuple):
            p[name] = float(rng.uniform(*value))
        else:
            p[name] = float(rng.choice(value)) if isinstance(value, list) else float(value)
    return p


def fast_and_steady(ranges: dict) -> dict:
    """An attacker drives well: the upper third of the speeds, the lower third of the noise."""
    def third(name: str, value):
        if not isinstance(value, tuple) or name not in ("v", "sigma"):
            return value
        low, high = value
        return (high - (high - low) / 3, high) if name == "v" else (low, low + (high - low) / 3)
    return {name: third(name, value) for name, value in ranges.items()}


def deal(quota: dict[str, float], episodes: int, rng: np.random.Generator) -> list[str]:
    """A kind per episode: shares exact up to rounding (largest remainder), order shuffled."""
    share = {kind: q * episodes for kind, q in quota.items()}
    count = {kind: int(s) for kind, s in share.items()}
    by_remainder = sorted(quota, key=lambda kind: count[kind] - share[kind])
    for kind in by_remainder[: episodes - sum(count.values())]:
        count[kind] += 1
    kinds = [kind for kind, n in count.items() for _ in range(n)]
    return [kinds[i] for i in rng.permutation(episodes)]


def run_episode(task: Task, kind: str, entropy: tuple[int, ...]) -> dict[str, np.ndarray]:
    """One episode of that kind. Drawn again in the rare case that it beats DSRL's reference maximum."""
    build, common, kinds = PLANS[task.name]
    for attempt in range(100):
        rng = np.random.default_rng((*entropy, attempt))
        ranges = common | kinds["risky" if kind == "attacker" else kind][1]
        p = draw(fast_and_steady(ranges) if kind == "attacker" else ranges, rng)
        env = simulator.make(task, int(rng.integers(2**31)))
        control = build(p)
        noise = rng.normal(size=(task.horizon, task.n_act)) * (0.714 * p["sigma"])
        for t in range(1, task.horizon):
            noise[t] += 0.7 * noise[t - 1]
        obs = np.empty((task.horizon + 1, task.n_obs), np.float32)
        action = np.empty((task.horizon, task.n_act), np.float32)
        reward, cost = np.empty(task.horizon, np.float32), np.empty(task.horizon, np.float32)
        state, _ = env.reset()
        obs[0] = state
        n, terminated, truncated = 0, False, False
        while not (terminated or truncated):
            action[n] = np.clip(control(state.tolist() if task.n_act < 8 else state) + noise[n], -1, 1)
            state, reward[n], terminated, truncated, info = env.step(action[n])
            cost[n] = info["cost"]
            n += 1
            obs[n] = state
        env.close()
        if reward[:n].sum(dtype=np.float64) <= task.return_max:
            break
    else:
        raise RuntimeError(f"{task.name}: '{kind}' controllers never stay under the reference return {task.return_max}")
    last = np.arange(n) == n - 1
    return {
        "obs": obs[:n], "action": action[:n], "reward": reward[:n], "cost": cost[:n], "next_obs": obs[1 : n + 1],
        "terminal": last & terminated, "timeout": last & (not terminated),
    }


def collect(task: str | Task, episodes: int, seed: int, mix: str = "default", workers: int | None = None,
            progress: bool = True) -> dict[str, np.ndarray]:
    """Collect `episodes` episodes on all cores; the same bytes for the same (task, episodes, seed, mix).

    `mix="risky"` gives an attacker's rollouts: risky episodes only, fast and steady ones, from a random stream of their own.
    Returns obs [N, n_obs], action [N, n_act], reward, cost, next_obs (float32), terminal, timeout (bool), episode by
    episode in order. Raises UserError for a task without controllers, an unknown mix, or no episodes.
    """
    task = get_task(task)
    if task.name not in PLANS:
        known = ", ".join(PLANS)
        raise UserError(f"{task.name} has no local controllers; give an HDF5 file as source, or take one of: {known}.")
    if mix not in STREAMS:
        raise UserError(f"unknown mix '{mix}'; known: {', '.join(STREAMS)}.")
    if episodes < 1:
        raise UserError(f"collect needs at least 1 episode, got {episodes}.")
    kinds = {kind: quota for kind, (quota, _) in PLANS[task.name][2].items()} if mix == "default" else {"attacker": 1.0}
    entropy = (int(seed), STREAMS[mix], list(TASKS).index(task.name))
    dealt = deal(kinds, episodes, np.random.default_rng(entropy))
    jobs = [(task, kind, (*entropy, e)) for e, kind in enumerate(dealt)]
    parts = simulator.parallel(run_episode, jobs, workers, f"collect {task.name}", progress)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
