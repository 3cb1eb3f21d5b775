import types

from benchmarks.search import epochs_to, surface_ap


def trial(*values):
    return types.SimpleNamespace(intermediate_values=dict(enumerate(values, 1)), last_step=len(values))


def test_epochs_count_in_the_order_of_the_trials_without_trial_0():
    trials = [trial(0.9, 0.9), trial(0.1, 0.2, 0.3), trial(0.2, 0.5, 0.6)]
    assert epochs_to(trials, 0.5) == 5
    assert epochs_to(trials, 0.3) == 3
    assert epochs_to(trials, 0.7) is None


def test_the_surface_has_its_optimum_inside():
    def ap(lr, eos, epoch=9):
        return surface_ap({"optim": {"lr": lr}, "loss": {"eos_coef": eos}}, epoch)

    assert ap(5e-4, 0.2) > max(ap(1e-5, 0.2), ap(1e-2, 0.2), ap(5e-4, 0.01), ap(5e-4, 1.0))
    assert ap(5e-4, 0.2, 9) > ap(5e-4, 0.2, 1)
