"""`make undeploy` leaves nothing of a deployment, and what is beside it alone."""

from tests.kubernetes.cluster import kubectl


def test_undeploy_says_what_it_removes_and_leaves_nothing(first, shop):
    status, said = first.make("undeploy")
    assert status == 0, said
    assert f"undeploy {first.name}" in said
    kinds = "deployment,service,hpa,pdb,networkpolicy,ingress,httproute,configmap,secret,job"
    assert first.kubectl("get", kinds, f"--selector=app.kubernetes.io/name={first.name}", "--output=name") == ""
    assert len(shop.pods()) == 2


def test_deploy_without_a_context_says_which_there_are_and_touches_nothing(first):
    for context in ("", "nonsense"):
        status, said = first.make("deploy", context=context)
        assert status == 2
        assert kubectl("config", "current-context") in said
