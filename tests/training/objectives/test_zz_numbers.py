import importlib.util, sys, pathlib, torch
def load(n):
    s=importlib.util.spec_from_file_location(n, pathlib.Path(__file__).with_name(n+".py")); m=importlib.util.module_from_spec(s); s.loader.exec_module(m); return m
def test_numbers(bench, adapted, pair, apart, by_autograd):
    B=load("test_booster"); V=load("test_vaccine"); R=load("test_repnoise")
    out=[]
    for w in ("lora","full"):
        for acc in (1,4):
            t=bench("booster",accumulation=acc,weights=w).take(*pair,B.SETTINGS); e,_,_=B._by_hand(adapted(weights=w),*pair,5.0,.3)
            out.append(("booster",w,acc,*apart(t.gradients,e)))
    for taps in ("attention","layer"):
        for scope in ("batch","sample"):
            t=bench("vaccine",accumulation=4).take(pair[0],None,V.VaccineSettings(rho=3.0,scope=scope,taps=taps)); m=adapted(); l,_=V._by_hand(m,pair[0],3.0,scope,taps)
            out.append(("vaccine",taps,scope,*apart(t.gradients,by_autograd(m,l)), t.step.measured["embedding_perturbation_norm"]-3))
    for acc in (1,4):
        r=bench("vaccine",accumulation=acc); w=V._Watch(r.engine.module); r.take(pair[0],None,V.VaccineSettings(rho=2.5))
        L=torch.stack([s.square().sum() for o in w.shifts[acc:] for s in o.values()]).sum().sqrt(); out.append(("ball",acc,float(L/2.5-1)))
    for acc in (1,4):
        for kw in ({}, {"mmd":"biased"}, {"ascent":"last"}):
            t=bench("repnoise",accumulation=acc).take(*pair,R.RepNoiseSettings(**{**R.STRONG,**kw})); m=adapted()
            tot,_,_=R._by_hand(m,*pair,**R.STRONG,unbiased=kw.get("mmd")!="biased",everywhere="ascent" not in kw); out.append(("repnoise",acc,kw,*apart(t.gradients,by_autograd(m,tot))))
    for n in (4,8,32):
        g=torch.Generator().manual_seed(n); d=torch.stack([R.squared_mmd(*torch.randn(2,n,20,generator=g)) for _ in range(400)]); out.append(("mmd",n,float(d.mean()),float(d.std())/20))
    print(*out,sep="\n"); assert 0
