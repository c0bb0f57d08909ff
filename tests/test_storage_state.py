"""Storage formats around a step: state_dict(), files, conversions, refusals, sizes, FlatBuffers and shards."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest
from conftest import bits
from test_readme import example, page

import fastrms
from fastrms import formats, saved_formats, storage
from fastrms.backends import c

pytestmark = pytest.mark.skipif(c.lib is None, reason="formats are tested here on the C backend")
BF16 = lambda array: fastrms.Stored(array, "bf16")  # noqa: E731
SHAPES = {"w": (3, 7), "b": (), "none": (0, 4), "big": (1003,)}
STATE_FORMATS = ("bf16", "fp16", "q8")
MASTERS = ("float32", "split16", "split8", None)


def roundings(state_format):
    return ["stochastic"] if state_format == "q8" else ["nearest", "stochastic"]


def rounded(x):
    """The bits of numbers in bf16."""
    made = np.empty(x.size, np.uint16)
    formats.encode(storage.BF16, np.ascontiguousarray(x, np.float32).reshape(-1), made, x.size, formats.Rounding())
    return made.reshape(x.shape)


def problem(seed=0, fortran=True):
    """Named float32 parameters, one in Fortran order, and gradients of six steps."""
    rng = np.random.default_rng(seed)

    def values():
        made = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
        made["w"] = np.asfortranarray(made["w"]) if fortran else made["w"]
        return {key: np.asarray(x) for key, x in made.items()}

    return values(), [values() for _ in range(6)]


def halves(params):
    """The same parameters as bits of bf16, in the same memory order."""
    return {key: np.asarray(rounded(x), order="F" if key == "w" else "C") for key, x in params.items()}


def stored(params):
    return {key: BF16(x) for key, x in params.items()}


def made(params, master, **options):
    return fastrms.Adam(stored(params), master=master, rounding="stochastic", **options)


def frozen(optimizer):
    return pickle.dumps(optimizer.state_dict())


@pytest.mark.parametrize(
    "state_format, rounding",
    [(state_format, rounding) for state_format in STATE_FORMATS for rounding in roundings(state_format)],
)
@pytest.mark.parametrize("make", [fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(make, state_format, rounding, tmp_path):
    """Also into an optimizer that was made with another seed and another rounding."""
    params, gradients = problem()
    optimizer = make(params, state_format=state_format, rounding=rounding, seed=2**63 + 5)
    for k, gradient in enumerate(gradients):
        optimizer.save(tmp_path / "o")
        resumed = copy.deepcopy(params)
        resumed["w"] = np.asfortranarray(resumed["w"])
        both = (2 * roundings(state_format))[:2]
        others = [make(resumed, state_format=state_format, rounding=r, seed=k) for r in both]
        others[0].load(tmp_path / "o"), others[1].load_state_dict(pickle.loads(frozen(optimizer)))
        assert frozen(others[0]) == frozen(others[1]) == frozen(optimizer)
        optimizer.step(gradient), others[k % 2].step(gradient)
        assert all(np.array_equal(bits(params[key]), bits(resumed[key])) for key in params)
    assert frozen(others[k % 2]) == frozen(optimizer)


@pytest.mark.parametrize("state_format", [None, "bf16", "q8"])
@pytest.mark.parametrize("master", MASTERS)
def test_a_resumed_run_of_bf16_parameters_has_the_bits_of_an_unbroken_one(master, state_format, tmp_path):
    params, gradients = problem()
    params = halves(params)
    optimizer = made(params, master, state_format=state_format, seed=3)
    for gradient in gradients:
        optimizer.save(tmp_path / "o")
        resumed = {key: x.copy(order="K") for key, x in params.items()}
        other = made(resumed, master, state_format=state_format)
        other.load(tmp_path / "o")
        optimizer.step(gradient), other.step(gradient)
        assert all(np.array_equal(params[key], resumed[key]) for key in params)
        assert frozen(other) == frozen(optimizer)
    entry = optimizer.state_dict()["tensors"][0]
    low = {"float32": {"master": "float32"}, None: {}}.get(master, {"remainder": master})
    assert entry["formats"] == dict.fromkeys(("exp_avg", "exp_avg_sq"), state_format or "float32") | low
    assert (entry["seed"], entry["rounding"]) == (3, "stochastic")


def test_arrays_of_a_state_dict_are_what_is_stored():
    params, gradients = problem()
    for state_format, dtype in zip(STATE_FORMATS, (np.uint16, np.uint16, np.uint8), strict=True):
        optimizer = fastrms.RMSProp(params, state_format=state_format)
        optimizer.step(gradients[0])
        for entry, (key, shown) in zip(
            optimizer.state_dict()["tensors"], optimizer.state["square_avg"].items(), strict=True
        ):
            array = entry["state"]["square_avg"]
            assert array.dtype == dtype and np.array_equal(array.reshape(-1, order="A"), shown.bits)
            size = formats.stored_bytes(storage.Q8U, params[key].size)
            assert array.shape == ((size,) if state_format == "q8" else params[key].shape)


def test_plain_optimizers_have_the_state_dict_of_before():
    params, gradients = problem()
    optimizer = fastrms.Adam(params, rounding="nearest", seed=4)
    optimizer.step(gradients[0])
    assert all(entry.keys() == {"name", "steps", "state"} for entry in optimizer.state_dict()["tensors"])


PAIRS = [(a, b) for a in (None, *STATE_FORMATS) for b in (None, *STATE_FORMATS) if a != b]


@pytest.mark.parametrize("theirs, mine", PAIRS)
def test_other_formats_are_converted_by_name_alone(theirs, mine, tmp_path):
    params, gradients = problem()
    saved = fastrms.Adam(params, state_format=theirs)
    for gradient in gradients[:3]:
        saved.step(gradient)
    saved.save(tmp_path / "o")
    loading = fastrms.Adam(params, state_format=mine, seed=8)
    before, name = frozen(loading), theirs or "float32"
    wrong = next(other for other in saved_formats.CONVERTED if other not in (name, mine))
    remedy = f"state_format='{theirs}'" if theirs else "no state_format"
    sentence = rf"exp_avg of params\['w'\] is stored in {name} .*{mine or 'float32'} in this .*{remedy}.*convert='{name}'"
    for refused in ({}, {"convert": wrong}):
        with pytest.raises(ValueError, match=sentence):
            loading.load(tmp_path / "o", **refused)
        assert frozen(loading) == before
    loading.load(tmp_path / "o", convert=name)
    for state in ("exp_avg", "exp_avg_sq"):
        for key, x in saved.state[state].items():
            numbers, found = np.asarray(x), loading.state[state][key]
            if mine is None:
                assert np.array_equal(found, numbers)
            else:
                tensor = loading._tensors[list(params).index(key)]
                flat = np.ascontiguousarray(numbers.T if key == "w" else numbers).reshape(-1)
                format = saved_formats.formats_of(tensor)[state]
                assert np.array_equal(found.bits, storage.stored(format, flat))
    loading.step(gradients[4])


def test_q8_states_are_never_rounded_to_nearest():
    """Also where the saved states were: the optimizer refuses the pair, and does not take it over from a state_dict."""
    params, gradients = problem()
    saved = fastrms.Adam(params, state_format="bf16", rounding="nearest", seed=5)
    saved.step(gradients[0])
    loading = fastrms.Adam(params, state_format="q8")
    loading.load_state_dict(saved.state_dict(), convert="bf16")
    assert {(entry["rounding"], entry["seed"]) for entry in loading.state_dict()["tensors"]} == {("stochastic", 5)}


def test_a_mapping_that_is_no_state_dict_is_named_by_its_keys():
    with pytest.raises(ValueError, match=r"^this has the keys \['w', 'b'\], not those of a state_dict of fastrms"):
        fastrms.Adam(np.ones(3, np.float32)).load_state_dict({"w": 1, "b": 2})


@pytest.mark.parametrize("given", [None, [1]])
def test_what_is_no_state_dict_at_all(given):
    with pytest.raises(ValueError, match=f"^this is an? {type(given).__name__}, not a state_dict of fastrms: pass what"):
        fastrms.Adam(np.ones(3, np.float32)).load_state_dict(given)


def test_convert_must_be_the_name_of_a_format():
    params, _ = problem()
    optimizer = fastrms.Adam(params, state_format="q8")
    for wrong in ("fp32", True, "split16"):
        with pytest.raises(ValueError, match="convert="):
            optimizer.load_state_dict(optimizer.state_dict(), convert=wrong)


def test_q8_of_another_memory_order_is_not_taken_as_it_is():
    """Codes are stored in the order of memory: as they are, they would belong to other elements."""
    params, gradients = problem()
    saved = fastrms.RMSProp(params, state_format="q8")
    saved.step(gradients[0])
    other = fastrms.RMSProp(problem(fortran=False)[0], state_format="q8")
    d, before = saved.state_dict(), frozen(other)
    with pytest.raises(
        ValueError, match=r"square_avg of params\['w'\] has blocks of q8 in another memory order.*convert='q8'"
    ):
        other.load_state_dict(d)
    assert frozen(other) == before
    other.load_state_dict(d, convert="q8")
    mine, theirs = np.asarray(other.state["square_avg"]["w"]), np.asarray(saved.state["square_avg"]["w"])
    assert (np.abs(mine - theirs) <= theirs / 16).all() and mine.any()
    halved = fastrms.RMSProp(problem(fortran=False)[0], state_format="bf16")
    halved.load_state_dict(d, convert="q8")
    assert np.allclose(np.asarray(halved.state["square_avg"]["w"]), theirs, rtol=2**-8)


def damage(entry, what):
    """Damage a saved tensor of Adam with q8 states."""
    state, array = entry["state"], entry["state"]["exp_avg_sq"].copy()
    if what == "a byte less":
        state["exp_avg_sq"] = array[:-1]
    elif what == "a block more":
        state["exp_avg_sq"] = np.concatenate([array, array[-4:]])
    elif what == "another dtype":
        state["exp_avg_sq"] = array.view(np.int8)
    elif what in ("a negative base", "a large base"):
        array[-4:].view(np.int32)[:] = -1 if what == "a negative base" else 1787
        state["exp_avg_sq"] = array
    elif what == "a base between":
        array = state["exp_avg"].copy()
        array[-4:].view(np.int32)[:] += 4
        state["exp_avg"] = array
    elif what == "no such format":
        entry["formats"] = {**entry["formats"], "exp_avg": "q4"}
    elif what == "formats of no kind":
        entry["formats"] = 3
    elif what == "no seed":
        del entry["seed"]
    elif what == "a wrong seed":
        entry["seed"] = -1
    elif what == "a wrong rounding":
        entry["rounding"] = "up"
    elif what == "misaligned":
        raw = np.empty(array.size + 1, np.uint8)
        raw[1:] = array
        state["exp_avg_sq"] = raw[1:]


DAMAGES = ("a byte less", "a block more", "another dtype", "a negative base", "a large base", "a base between",
           "no such format", "formats of no kind", "no seed", "a wrong seed", "a wrong rounding")  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_blocks_are_refused_and_change_nothing(what):
    params, gradients = problem()
    saved, other = (fastrms.Adam(params, state_format="q8", seed=s) for s in (1, 2))
    saved.step(gradients[0])
    d, before = saved.state_dict(), frozen(other)
    damage(d["tensors"][3], what)
    with pytest.raises(ValueError, match=r"state_dict|seed|rounding"):
        other.load_state_dict(d)
    assert frozen(other) == before
    if what not in ("no seed", "a wrong seed", "a wrong rounding"):
        with pytest.raises(ValueError):
            fastrms.Adam(params).load_state_dict(d, convert="q8")


def test_blocks_that_are_misaligned_in_a_state_dict_are_read():
    params, gradients = problem()
    saved, other = (fastrms.Adam(params, state_format="q8", seed=s) for s in (1, 2))
    saved.step(gradients[0])
    d = saved.state_dict()
    damage(d["tensors"][3], "misaligned")
    other.load_state_dict(d)
    assert frozen(other) == frozen(saved)
    plain = fastrms.Adam(params)
    plain.load_state_dict(d, convert="q8")
    assert np.array_equal(plain.state["exp_avg_sq"]["big"], np.asarray(saved.state["exp_avg_sq"]["big"]))


@pytest.mark.parametrize("state_format", ["bf16", "fp16"])
def test_negative_second_moments_are_refused_in_every_format(state_format):
    params, _ = problem()
    optimizer = fastrms.Adam(params, state_format=state_format)
    d = optimizer.state_dict()
    for wrong in (0xBC00, 0x7FC1):  # a negative number, and NaN in both
        d["tensors"][3]["state"]["exp_avg_sq"][5] = wrong
        with pytest.raises(
            ValueError, match=r"exp_avg_sq of params\['big'\] in the state_dict holds a negative number or NaN"
        ):
            optimizer.load_state_dict(d)
    d["tensors"][3]["state"]["exp_avg_sq"][5] = 0
    d["tensors"][3]["state"]["exp_avg"][5] = 0xBC00
    optimizer.load_state_dict(d)


def test_another_master_is_refused_with_the_remedy():
    params = halves(problem()[0])
    dicts = {master: made(params, master).state_dict() for master in MASTERS}
    for mine in MASTERS:
        optimizer = made(params, mine)
        before = frozen(optimizer)
        for theirs in set(MASTERS) - {mine}:
            with pytest.raises(ValueError, match=r"params\['w'\].*master="):
                optimizer.load_state_dict(dicts[theirs], convert="float32")
            assert frozen(optimizer) == before


def test_a_float64_state_is_not_converted():
    w = np.ones(5)
    d = fastrms.Adam(w).state_dict()
    with pytest.raises(ValueError, match=r"ndarray of float32, shape \(5,\), and is float64, shape \(5,\): load it into an"):
        fastrms.Adam(w.astype(np.float32), state_format="bf16").load_state_dict(d, convert="float32")


def test_a_zero_in_the_padding_of_blocks_is_no_zero_of_the_sum():
    """AdaGrad without eps divides by the root of the sum."""
    w = np.ones(5, np.float32)
    optimizer = fastrms.AdaGrad(w, eps=0.0, initial_value=0.1, state_format="q8")
    optimizer.step(w.copy())
    optimizer.load_state_dict(optimizer.state_dict())
    d = optimizer.state_dict()
    d["tensors"][0]["state"]["sum"][4] = 0
    with pytest.raises(ValueError, match="holds a 0"):
        optimizer.load_state_dict(d)


def test_an_optimizer_whose_shards_are_refused_has_not_written_its_copy():
    w, copied = np.ones(5, np.float32), np.zeros(5, np.float16)
    with pytest.raises(TypeError, match=r"must be a fastrms\.Shards"):
        fastrms.Adam(w, param_copy=copied, shards=3)
    assert not copied.any()


# states as objects


def test_the_bits_of_a_state_are_in_use_and_its_numbers_are_a_copy():
    w = np.asfortranarray(np.ones((3, 5), np.float32))
    optimizer = fastrms.Adam(w, state_format="bf16")
    state, numbers = optimizer.state["exp_avg"], np.arange(15, dtype=np.float32).reshape(3, 5)
    np.asarray(state)[...] = 5
    assert not np.asarray(state).any()
    state.bits[:] = rounded(numbers.T).reshape(-1)  # in the memory order of the parameter
    assert np.array_equal(optimizer.state["exp_avg"], numbers)
    assert np.array_equal(np.asarray(state, np.float64), numbers) and np.array(state, copy=True).dtype == np.float32
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(ValueError, match="copy=False is impossible"):
            np.array(state, copy=False)


def test_formats_and_seeds_are_read_back():
    params = [np.ones(5, np.float32), np.ones(3)]
    optimizer = fastrms.Adam([{"params": params[0], "state_format": "q8"}, {"params": params[1]}], seed=11)
    said = {"formats": {"exp_avg": "q8", "exp_avg_sq": "q8"}, "rounding": "stochastic", "seed": 11}
    assert optimizer.formats == {"params[0]": said}
    other = fastrms.Adam([{"params": params[0], "state_format": "q8"}, {"params": params[1]}])
    other.load_state_dict(optimizer.state_dict())
    assert other.formats == optimizer.formats
    halved = fastrms.RMSProp(BF16(rounded(params[0])), master="split8", rounding="nearest")
    kept = {"square_avg": "float32", "remainder": "split8"}
    assert halved.formats == {"params": {"formats": kept, "rounding": "nearest", "seed": 0}}


# sizes


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_gradients_are_counted_as_the_last_were(backend):
    """A gradient that is given to each step need not be bound for that; one that is not there counts as the update."""
    params = [np.ones(7, np.float32), np.ones(5), BF16(rounded(np.ones(3)))]
    optimizer = fastrms.Adam(params, rounding="stochastic", backend=backend)
    assert optimizer.nbytes["grad"] == 7 * 4 + 5 * 8 + 3 * 4
    halved = BF16(rounded(np.ones(7))), np.ones(5), BF16(rounded(np.ones(3)))
    optimizer.step([*halved])
    assert optimizer.nbytes["grad"] == 7 * 2 + 5 * 8 + 3 * 2 and "grad 2," in optimizer.report()
    optimizer.step([np.ones(7, np.float32), np.ones(5), None])
    assert optimizer.nbytes["grad"] == 7 * 4 + 5 * 8 + 3 * 4
    optimizer.bind([*halved])
    assert optimizer.nbytes["grad"] == 7 * 2 + 5 * 8 + 3 * 2


def test_gradients_of_a_flat_buffer_of_bf16_are_counted_before_the_first_step():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    flat = fastrms.FlatBuffer([7, 6], ml_dtypes.bfloat16)
    optimizer = fastrms.Adam(flat, master="float32")
    assert optimizer.nbytes["grad"] == 26 and "grad 2," in optimizer.report()
    optimizer.step(np.ones(13, np.float32))
    assert optimizer.nbytes["grad"] == 52
    optimizer.step(flat.grads)
    assert optimizer.nbytes["grad"] == 26


def test_gradients_that_torch_has_are_counted():
    torch = pytest.importorskip("torch")
    param = torch.ones(7)
    optimizer = fastrms.Adam([param])
    for _ in range(2):
        optimizer.step([torch.ones(7, dtype=torch.bfloat16)])
        assert optimizer.nbytes["grad"] == 14


def test_nbytes_are_those_of_the_buffers():
    params, gradients = problem()
    elements = sum(x.size for x in params.values())
    q8 = sum(formats.stored_bytes(storage.Q8, x.size) for x in params.values())
    copies = {key: np.zeros_like(x, np.float16) for key, x in params.items()}
    optimizer = fastrms.Adam(params, state_format="q8", param_copy=copies)
    assert optimizer.nbytes == {
        "param": 4 * elements, "grad": 4 * elements, "exp_avg": q8, "exp_avg_sq": q8, "param_copy": 2 * elements,
    }  # fmt: skip
    optimizer.bind(stored(halves(gradients[0])))
    found = optimizer.nbytes
    assert found["grad"] == 2 * elements and found.elements == elements and found.total == sum(found.values())
    assert found.per_parameter["param_copy"] == 2
    assert fastrms.Adam(np.ones(0)).nbytes.per_parameter == {"param": 0, "grad": 0, "exp_avg": 0, "exp_avg_sq": 0}
    assert fastrms.RMSProp(np.ones(5)).nbytes == {"param": 40, "grad": 40, "square_avg": 40}


@pytest.mark.parametrize(
    "master, low",
    [("float32", {"master": 4}), ("split16", {"remainder": 2}), ("split8", {"remainder": 1}), (None, {})],
)
def test_nbytes_of_bf16_parameters(master, low):
    params = halves(problem()[0])
    assert made(params, master).nbytes.per_parameter == {"param": 2, "grad": 4, "exp_avg": 4, "exp_avg_sq": 4, **low}


@pytest.mark.parametrize(
    "options, moved",
    [
        ({}, 28), ({"state_format": "bf16"}, 20), ({"state_format": "q8"}, 16.06), ({"zero_grad": True}, 32),
        ({"param_copy": np.zeros(2**16, np.float16)}, 30),
    ],
)  # fmt: skip
def test_the_report_says_how_many_bytes_are_moved(options, moved):
    """Adam: 4 numbers read and 3 written; of the formats, what is stored."""
    text = fastrms.Adam(np.zeros(2**16, np.float32), **options).report()
    assert f"{moved} bytes moved per element" in text and "param 4, grad 4, exp_avg " in text


@pytest.mark.parametrize("master, moved", [("float32", 2 + 8 + 4 + 8), ("split16", 4 + 4 + 4 + 8), (None, 4 + 4 + 8)])
def test_a_parameter_with_a_float32_master_is_only_written(master, moved):
    w = BF16(np.zeros(300, np.uint16))
    assert f", {moved} bytes moved per element" in fastrms.RMSProp(w, master=master, rounding="nearest").report()


def test_the_report_of_mixed_dtypes_gives_the_mean():
    params = [BF16(np.zeros(300, np.uint16)), np.zeros(100, np.float32)]
    text = fastrms.RMSProp(params, rounding="nearest").report()
    assert ", 17 bytes moved per element" in text and "param 2.5, grad 4, square_avg 4" in text
    assert " 0 elements, 16 bytes" in fastrms.RMSProp(BF16(np.zeros(0, np.uint16)), rounding="nearest").report()


# refusals


def test_given_states_and_formats_exclude_each_other():
    w = np.ones(3, np.float32)
    state = fastrms.init_state("rmsprop", w)
    with pytest.raises(ValueError, match="state= and state_format='bf16' are both given"):
        fastrms.RMSProp(w, state=state, state_format="bf16")
    halved = BF16(rounded(w))
    optimizer = fastrms.RMSProp(halved, state=state, master="split16")
    optimizer.step(w.copy())
    assert state["square_avg"].any()


# FlatBuffers


def flat_problem(dtype=np.float32, count=3):
    """A FlatBuffer, the same arrays as a mapping, and flat gradients."""
    rng = np.random.default_rng(1)
    params = {key: rng.standard_normal(shape).astype(dtype) for key, shape in SHAPES.items() if key != "none"}
    params["b"] = np.asarray(params["b"])
    return fastrms.FlatBuffer.like(params), params, [rng.standard_normal(1025).astype(np.float32) for _ in range(count)]


def of_names(flat, whole):
    """A flat array by the names of a FlatBuffer."""
    begin, found = 0, {}
    for name, view in flat.params.items():
        found[name] = whole[begin : begin + view.size].reshape(view.shape)
        begin += view.size
    return found


@pytest.mark.parametrize("groups", [None, {"b": {"weight_decay": 0.1}}])
@pytest.mark.parametrize("state_format", ["bf16", "fp16"])
def test_a_flat_buffer_has_the_bits_of_its_arrays(state_format, groups):
    flat, params, gradients = flat_problem()
    copies = np.zeros(1025, np.float16)
    whole = fastrms.Adam(flat, state_format=state_format, groups=groups, param_copy=copies)
    each = fastrms.Adam(params, state_format=state_format, groups=groups)
    for gradient in gradients:
        whole.step(BF16(rounded(gradient)))
        each.step(stored({key: np.array(x) for key, x in of_names(flat, rounded(gradient)).items()}))
    for key, x in params.items():
        assert np.array_equal(bits(flat.params[key]), bits(x))
        assert np.array_equal(flat.params[key].astype(np.float16), of_names(flat, copies)[key])
        for mine, theirs in ((whole.state[s][key], each.state[s][key]) for s in ("exp_avg", "exp_avg_sq")):
            assert mine.shape == theirs.shape == x.shape and np.array_equal(mine.bits, theirs.bits)
            assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    each.load_state_dict(whole.state_dict())
    assert frozen(each) == frozen(whole)


def test_a_flat_buffer_with_blocks_is_saved_whole(tmp_path):
    flat, params, gradients = flat_problem()
    optimizer = fastrms.Adam(flat, state_format="q8", seed=5)
    for gradient in gradients:
        optimizer.step(gradient)
    (entry,) = optimizer.state_dict()["tensors"]
    assert entry["name"] == "params" and entry["state"]["exp_avg"].shape == (formats.stored_bytes(storage.Q8, 1025),)
    optimizer.save(tmp_path / "o")
    other = fastrms.Adam(fastrms.FlatBuffer.like(flat.params), state_format="q8")
    other.load(tmp_path / "o")
    assert frozen(other) == frozen(optimizer)
    shown = optimizer.state["exp_avg"]
    plain = fastrms.Adam(fastrms.FlatBuffer.like(flat.params))
    with pytest.raises(ValueError, match="exp_avg of params is stored in q8 in the state_dict, and in float32"):
        plain.load(tmp_path / "o")
    plain.load(tmp_path / "o", convert="q8")
    assert all(np.array_equal(plain.state["exp_avg"][key], np.asarray(shown[key])) for key in params)
    before = frozen(other)
    with pytest.raises(ValueError, match=r"exp_avg of params\['w'\] is stored in float32"):
        other.load_state_dict(plain.state_dict())
    assert frozen(other) == before
    other.load_state_dict(plain.state_dict(), convert="float32")
    assert np.array_equal(other.state["exp_avg"]["big"].bits, storage.stored(storage.Q8, np.asarray(shown_flat(optimizer))))


def test_blocks_of_named_arrays_are_not_those_of_a_flat_buffer():
    """Each array has blocks of its own: as they are, those of the last name would be taken for those of all."""
    flat, params, gradients = flat_problem()
    each, whole = (fastrms.Adam(x, state_format="q8") for x in (params, flat))
    for gradient in gradients:
        each.step({key: np.array(x) for key, x in of_names(flat, gradient).items()})
    before, saved = frozen(whole), each.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg of params\['w'\] has blocks of q8 of fewer elements than .*convert='q8'"):
        whole.load_state_dict(saved)
    assert frozen(whole) == before
    whole.load_state_dict(saved, convert="q8")
    (tensor,) = whole._tensors
    for state in ("exp_avg", "exp_avg_sq"):
        numbers = np.concatenate([np.asarray(x).reshape(-1) for x in each.state[state].values()])
        format = saved_formats.formats_of(tensor)[state]
        assert np.array_equal(tensor.state[state], storage.stored(format, numbers)) and numbers.any()
    before = frozen(each)
    with pytest.raises(ValueError, match=r"has no params\['w'\]: params was saved whole, .* FlatBuffer .*convert='q8'"):
        each.load_state_dict(whole.state_dict())
    assert frozen(each) == before
    plain = fastrms.Adam(fastrms.FlatBuffer.like(params))
    plain.load_state_dict(whole.state_dict(), convert="q8")
    each.load_state_dict(plain.state_dict(), convert="float32")  # the way that the sentence says
    assert frozen(each) != before


def test_a_flat_buffer_in_groups_has_blocks_for_each_name():
    flat, params, gradients = flat_problem()
    groups = {"b": {"weight_decay": 0.1}}
    each, whole = (fastrms.Adam(x, state_format="q8", groups=groups) for x in (params, flat))
    for gradient in gradients:
        each.step({key: np.array(x) for key, x in of_names(flat, gradient).items()})
    whole.load_state_dict(each.state_dict())
    assert frozen(whole) == frozen(each)


def test_a_flat_buffer_of_one_name_is_saved_as_its_array():
    w = np.random.default_rng(0).standard_normal((30, 11)).astype(np.float32)
    flat, gradient = fastrms.FlatBuffer.like({"w": w}), w[::-1].copy()
    one, other = fastrms.Adam({"w": w}, state_format="q8"), fastrms.Adam(flat, state_format="q8")
    one.step({"w": gradient})
    other.step(gradient.reshape(-1))
    assert frozen(one) == frozen(other)
    one.load_state_dict(other.state_dict())
    other.load_state_dict(one.state_dict())
    assert np.array_equal(other.state["exp_avg"]["w"], one.state["exp_avg"]["w"]) and frozen(one) == frozen(other)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3)])
def test_a_q8_state_of_another_shape_is_refused(shape, tmp_path):
    saved = fastrms.Adam(np.ones((2, 3), np.float32), state_format="q8")
    saved.step(np.ones((2, 3), np.float32))
    saved.save(tmp_path / "o")
    for mine, convert in (("q8", None), ("q8", "q8"), (None, "q8"), ("bf16", "q8")):
        other = fastrms.Adam(np.ones(shape, np.float32), state_format=mine)
        before = frozen(other)
        with pytest.raises(ValueError) as caught:
            other.load(tmp_path / "o", convert=convert)
        sentence = f"exp_avg of params in the state_dict has the shape (2, 3), in this optimizer {shape}"
        assert str(caught.value).endswith(sentence) and frozen(other) == before
    d = saved.state_dict()
    del d["tensors"][0]["shape"]  # as it was saved before there was one
    other = fastrms.Adam(np.ones((2, 3), np.float32), state_format="q8")
    other.load_state_dict(d)
    assert frozen(other) == frozen(saved)


def shown_flat(optimizer):
    """exp_avg of a FlatBuffer in one dimension."""
    return np.concatenate([np.asarray(x).reshape(-1) for x in optimizer.state["exp_avg"].values()])


@pytest.mark.parametrize("master", MASTERS)
def test_a_flat_buffer_of_bf16(master, tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    flat, params, gradients = flat_problem(ml_dtypes.bfloat16)
    assert flat.data.dtype == flat.grad.dtype == ml_dtypes.bfloat16
    whole, each = (fastrms.RMSProp(x, master=master, rounding="stochastic", state_format="bf16") for x in (flat, params))
    for gradient in gradients:
        flat.grad[...] = gradient
        whole.step(flat.grads)
        each.step({key: np.array(x) for key, x in flat.grads.items()})
        assert all(np.array_equal(flat.params[key].view(np.uint16), x.view(np.uint16)) for key, x in params.items())
    whole.save(tmp_path / "o")
    each.load(tmp_path / "o")
    assert frozen(each) == frozen(whole)
    again = pickle.loads(pickle.dumps(flat))
    assert again.data.dtype == flat.data.dtype and np.array_equal(again.data, flat.data)


def test_a_flat_buffer_is_made_like_arrays_of_16_bits():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.linspace(-1, 1, 7, dtype=np.float32)
    halved = fastrms.FlatBuffer.like([BF16(rounded(x))])
    assert halved.data.dtype == ml_dtypes.bfloat16 and np.array_equal(halved.params[0].view(np.uint16), rounded(x))
    torch = pytest.importorskip("torch")
    made = fastrms.FlatBuffer.like({"t": torch.from_numpy(x).bfloat16()})
    assert np.array_equal(made.data, halved.data)
    with pytest.raises(TypeError, match=r"has dtype float32, .* has bfloat16; a FlatBuffer has one"):
        fastrms.FlatBuffer.like([BF16(rounded(x)), x])
    with pytest.raises(TypeError, match="a FlatBuffer holds float32 or float64, or bfloat16"):
        fastrms.FlatBuffer.like([x.astype(np.float16)])
    with pytest.raises(TypeError, match="float16"):
        fastrms.FlatBuffer([3], np.int16)


def test_copies_of_a_flat_buffer_are_one_array():
    flat, params, _ = flat_problem()
    for wrong in (params, np.zeros(1024, np.float16), np.zeros((1025, 1), np.float16)):
        with pytest.raises(ValueError, match="param_copy of a FlatBuffer must be one array of its 1025 elements"):
            fastrms.Adam(flat, param_copy=wrong)


# shards


@pytest.mark.parametrize("master", [None, "split8"])
@pytest.mark.parametrize("count", [2, 3])
def test_random_numbers_do_not_depend_on_shards(master, count):
    """States of bf16 and parameters without master, over ranks whose parts end anywhere; with norms of bf16 gradients."""
    from test_shards import Communicator, at_once, edges_of, no_error

    sizes, rng = [5, 3 * 1024 + 17, 0, 2011], np.random.default_rng(2)
    values = [rounded(rng.standard_normal(size)) for size in sizes]
    gradients = [[rounded(rng.standard_normal(size)) for size in sizes] for _ in range(3)]
    whole = [x.copy() for x in values]
    options = {"master": master, "rounding": "stochastic", "state_format": "bf16", "seed": 7}
    optimizer = fastrms.Adam([BF16(x) for x in whole], **options)
    norms = [optimizer.step([BF16(g) for g in some], clip_norm=1.0).grad_norm for some in gradients]
    edges = [edges_of("ugly", size, count) for size in sizes]
    comm = Communicator(count)

    def work(rank):
        spans = [slice(edge[rank], edge[rank + 1]) for edge in edges][::-1]  # in an order of its own
        mine = [values[k][span].copy() for k, span in zip((3, 2, 1, 0), spans, strict=True)]
        table = [(10 * k, span.start, sizes[k]) for k, span in zip((3, 2, 1, 0), spans, strict=True)]
        shards = fastrms.Shards(comm.gather_of(rank), table)
        local = fastrms.Adam([BF16(x) for x in mine], shards=shards, **options)
        found = [
            local.step([BF16(some[k][span]) for k, span in zip((3, 2, 1, 0), spans, strict=True)], clip_norm=1.0).grad_norm
            for some in gradients
        ]
        return found, mine, [x.bits.copy() for x in local.state["exp_avg_sq"]]

    found = no_error(at_once(count, work))
    assert all(rank[0] == norms for rank in found)
    for k in range(4):
        assert np.array_equal(np.concatenate([rank[1][3 - k] for rank in found]), whole[k])
        state = optimizer.state["exp_avg_sq"][k].bits
        assert np.array_equal(np.concatenate([rank[2][3 - k] for rank in found]), state)


def test_sharded_optimizers_over_mpi_refuse_formats_and_decode_gradients():
    from types import SimpleNamespace

    from fastrms import mpi
    from fastrms.memory import host

    made = mpi.ShardedOptimizer.__new__(mpi.ShardedOptimizer)
    made._ranks = SimpleNamespace(size=1, rank=0)
    w = np.ones(5, np.float32)
    for name, value in {"state_format": "q8", "master": "float32", "param_copy": np.zeros(5, np.float16)}.items():
        with pytest.raises(ValueError, match=f"{name}=.* is not for a ShardedOptimizer"):
            made._arrange(w, fastrms.Adam, None, mpi.BUCKET, {name: value})
        with pytest.raises(ValueError, match=f"{name}=.* is not for a ShardedOptimizer"):
            made._arrange([{"params": w, name: value}], fastrms.Adam, None, mpi.BUCKET, {})
    made._arrange(w, fastrms.Adam, None, mpi.BUCKET, {"state_format": None})
    grad = host.acquire(BF16(rounded(np.arange(5))), "grads", writable=False, halves=True)
    ((flat, bucket, _, labelled),) = made._steps
    made._pack(flat, bucket, labelled, [grad])
    assert np.array_equal(flat.work[:5], np.arange(5))


# torch's state_dict


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("state_format", STATE_FORMATS)
def test_states_go_to_torch_and_back_in_float32(state_format, flat):
    pytest.importorskip("torch")
    buffer, params, gradients = flat_problem()
    optimizer = fastrms.Adam(buffer if flat else params, state_format=state_format)
    for gradient in gradients:
        optimizer.step(gradient if flat else {key: np.array(x) for key, x in of_names(buffer, gradient).items()})
    d = optimizer.to_torch_state_dict()
    for state in ("exp_avg", "exp_avg_sq"):
        for number, x in enumerate(optimizer.state[state].values()):
            assert np.array_equal(d["state"][number][state].numpy(), np.asarray(x))
    plain = fastrms.Adam(params)
    plain.load_torch_state_dict(d)
    assert np.array_equal(plain.state["exp_avg"]["big"], np.asarray(optimizer.state["exp_avg"]["big"]))
    other = fastrms.Adam(buffer if flat else params, state_format=state_format)
    before = frozen(other)
    with pytest.raises(ValueError, match=r"is stored in float32 .* convert='float32'"):
        other.load_torch_state_dict(d)
    assert frozen(other) == before
    other.load_torch_state_dict(d, convert="float32")
    mine, theirs = (np.asarray(o.state["exp_avg"]["big"]) for o in (other, optimizer))
    assert other.steps == 3 and np.abs(mine - theirs).max() <= np.abs(theirs).max() / 16


def test_a_master_is_not_loaded_from_torch():
    pytest.importorskip("torch")
    params = halves(problem()[0])
    for master in MASTERS[:3]:
        optimizer = made(params, master)
        with pytest.raises(ValueError, match=f"master='{master}'.*which torch's state_dict lacks"):
            optimizer.load_torch_state_dict(optimizer.to_torch_state_dict())


def test_the_examples_of_the_page_run(capsys):
    w = np.ones(300, np.float32)
    names = {"fastrms": fastrms, "np": np, "w": w, "gw": np.full(300, 0.5, np.float32)}
    code = example("halved.step(")
    exec(code, names)
    assert capsys.readouterr().out.strip() in code and (w < 1).all()
    assert np.array_equal(names["gw16"], rounded(names["gw"]))
    exec(example("saved = halved"), names)
    found, wanted = (np.asarray(names[name].state["exp_avg"]) for name in ("small", "halved"))
    assert names["small"].steps == 1 and np.allclose(found, wanted, rtol=1 / 16)
    names |= {"b": np.ones(7, np.float32), "gb": np.ones(7, np.float32)}
    exec(example("same = fastrms.Stored(bits"), names)
    exec(example("trained.step("), names)
    exec(example("mixed.step(gw"), names)
    assert capsys.readouterr().out.split() == ["True", "True"] and names["mixed"].steps == 1
    exec(example("param_copy=w16, seed=1"), names)
    assert np.array_equal(names["w16"], w.astype(np.float16)) and names["state"]["exp_avg"].array.all()


@pytest.mark.parametrize("row, moved", [
    ({}, (20, 28)),
    ({"grad": True}, (18, 26)),
    ({"grad": True, "state_format": "bf16"}, (14, 18)),
    ({"grad": True, "state_format": "q8"}, (12.03, 14.06)),
    ({"grad": True, "param": True, "master": "float32"}, (20, 28)),
    ({"grad": True, "param": True, "state_format": "bf16", "master": "split16"}, (14, 18)),
    ({"grad": True, "param": True, "state_format": "bf16", "rounding": "stochastic"}, (10, 14)),
])  # fmt: skip
def test_the_table_of_bytes_is_what_reports_say(row, moved):
    options = {name: value for name, value in row.items() if name not in ("grad", "param")}
    assert f" {moved[0]} | {moved[1]} |" in page("formats")
    for make, count in zip((fastrms.RMSProp, fastrms.Adam), moved, strict=True):
        half, x = BF16(np.zeros(512, np.uint16)), np.zeros(512, np.float32)
        optimizer = make(half if "param" in row else x, **options)
        optimizer.bind(BF16(np.zeros(512, np.uint16)) if "grad" in row else x.copy())
        assert f", {count} bytes moved" in optimizer.report()


def test_bytes_of_the_gradients_of_a_flat_buffer_are_those_that_it_has():
    flat = fastrms.FlatBuffer({"w": (3, 7), "b": 5}, ml_dtypes.bfloat16)
    for groups in (None, {"b": {"weight_decay": 0.1}}):
        optimizer = fastrms.Adam(flat, master="split16", groups=groups)
        assert optimizer.nbytes.per_parameter == {"param": 2, "grad": 2, "exp_avg": 4, "exp_avg_sq": 4, "remainder": 2}
        assert "grad 2, " in optimizer.report()


def test_a_stored_state_is_not_pickled():
    optimizer = fastrms.Adam(np.ones(5, np.float32), state_format="q8")
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match=r"copy or pickle opt.state_dict\(\), or np.asarray\(\) of the state"):
            duplicate(optimizer.state["exp_avg"])


def test_a_state_in_a_format_is_written_by_its_bits():
    """The advice of the error works."""
    optimizer = fastrms.Adam(np.ones(3, np.float32), state_format="bf16")
    with pytest.raises(TypeError, match=r"stays; write into it: \['exp_avg'\]\.bits\[\.\.\.\] = x$"):
        optimizer.state["exp_avg"] = np.ones(3, np.float32)
    optimizer.state["exp_avg"].bits[...] = 0x3F80
    assert np.array_equal(np.asarray(optimizer.state["exp_avg"]), np.ones(3, np.float32))
