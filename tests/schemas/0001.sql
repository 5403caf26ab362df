BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE datasets (
	name VARCHAR(63) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	digest VARCHAR(80) NOT NULL, 
	num_rows BIGINT NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	parents TEXT NOT NULL, 
	job_id VARCHAR(63) NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "datasets" VALUES('chats','conversations','sha256:1',3,40,1795394449392369,'[]','');
CREATE TABLE events (
	job_id VARCHAR(63) NOT NULL, 
	sequence BIGINT NOT NULL, 
	create_time BIGINT NOT NULL, 
	payload TEXT NOT NULL, 
	PRIMARY KEY (job_id, sequence), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',1,1795394449399323,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',2,1795394449405037,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',3,1795394449407321,'{"type":"log","message":"hello"}');
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',4,1795394449407321,'{"type":"progress","phase":"generating","step":3,"total_steps":null,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":null,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}');
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',5,1795394449410156,'{"type":"result","result":{"type":"generation","dataset":"made","digest":"sha256:0","num_conversations":10,"num_rejected":1,"rejections":{"DUPLICATE":1},"provider":"offline"}}');
INSERT INTO "events" VALUES('job-660e6d86350ae9a7581c3',6,1795394449411894,'{"type":"state_change","state":"SUCCEEDED","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d86397a130600ed9',1,1795394449415292,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d86397a130600ed9',2,1795394449418448,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d86397a130600ed9',3,1795394449420138,'{"type":"progress","phase":"training","step":7,"total_steps":9,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":1.5,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}');
INSERT INTO "events" VALUES('job-660e6d86397a130600ed9',4,1795394449421863,'{"type":"state_change","state":"FAILED","attempt":1,"message":"loss is nan","error":{"kind":"KnowledgeEngineError","message":"loss is nan","reason":"NON_FINITE","violations":[],"retry_after_seconds":null,"metadata":{"step":"7"}}}');
INSERT INTO "events" VALUES('job-660e6d863babbbe013a0b',1,1795394449423978,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d863babbbe013a0b',2,1795394449427873,'{"type":"state_change","state":"CANCELLED","attempt":0,"message":"cancelled on request","error":null}');
INSERT INTO "events" VALUES('job-660e6d863d1edba82fc21',1,1795394449430080,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d863d1edba82fc21',2,1795394449433709,'{"type":"state_change","state":"RUNNING","attempt":1,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d863f3489fae3e69',1,1795394449439006,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
INSERT INTO "events" VALUES('job-660e6d863ff22a99b4495',1,1795394449441878,'{"type":"state_change","state":"QUEUED","attempt":0,"message":"","error":null}');
CREATE TABLE jobs (
	id VARCHAR(63) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	spec TEXT NOT NULL, 
	result TEXT, 
	error TEXT, 
	progress TEXT, 
	create_time BIGINT NOT NULL, 
	start_time BIGINT, 
	end_time BIGINT, 
	attempt INTEGER NOT NULL, 
	crashes INTEGER NOT NULL, 
	creator VARCHAR(63) NOT NULL, 
	tracker_run TEXT, 
	last_sequence BIGINT NOT NULL, 
	worker_pid INTEGER, 
	worker_started FLOAT, 
	lease_expires FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('job-660e6d86350ae9a7581c3','generation','SUCCEEDED','{"catalogue":"shop","dataset":"made","num_conversations":10,"topics":[],"difficulty_level":"medium","include_product_data":true,"seed":42}','{"type":"generation","dataset":"made","digest":"sha256:0","num_conversations":10,"num_rejected":1,"rejections":{"DUPLICATE":1},"provider":"offline"}',NULL,'{"type":"progress","phase":"generating","step":3,"total_steps":null,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":null,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}',1795394449395926,1795394449403752,1795394449410949,1,0,'shop-a',NULL,6,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d86397a130600ed9','training','FAILED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":42}',NULL,'{"kind": "KnowledgeEngineError", "message": "loss is nan", "reason": "NON_FINITE", "violations": [], "retry_after_seconds": null, "metadata": {"step": "7"}}','{"type":"progress","phase":"training","step":7,"total_steps":9,"epoch":null,"num_examples":null,"examples_per_second":null,"loss":1.5,"eval_loss":null,"learning_rate":null,"grad_norm":null,"tokens_per_second":null,"eta_seconds":null,"memory_bytes":null}',1795394449414082,1795394449417683,1795394449421466,1,0,'shop-a',NULL,4,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d863babbbe013a0b','training','CANCELLED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":1}',NULL,NULL,NULL,1795394449423058,NULL,1795394449427473,0,0,'shop-b',NULL,2,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d863d1edba82fc21','training','RUNNING','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":2}',NULL,NULL,NULL,1795394449428995,1795394449432452,NULL,1,0,'',NULL,2,4242,1700000000.5,1.79539447943607759477e+09);
INSERT INTO "jobs" VALUES('job-660e6d863f3489fae3e69','training','QUEUED','{"base_model":"base","dataset":"chats","model":"assistant","use_qlora":true,"lora":{"rank":16,"alpha":32,"dropout":0.05,"target_modules":[]},"learning_rate":0.001,"lr_scheduler_type":"linear","warmup_ratio":0.03,"weight_decay":0.0,"max_grad_norm":1.0,"num_train_epochs":null,"max_steps":null,"per_device_train_batch_size":1,"gradient_accumulation_steps":1,"max_length":null,"eval_split":0.1,"eval_steps":0,"logging_steps":1,"seed":3}',NULL,NULL,NULL,1795394449437535,NULL,NULL,0,0,'shop-b',NULL,1,NULL,NULL,NULL);
INSERT INTO "jobs" VALUES('job-660e6d863ff22a99b4495','generation','QUEUED','{"catalogue":"shop","dataset":"more","num_conversations":20,"topics":[],"difficulty_level":"medium","include_product_data":true,"seed":42}',NULL,NULL,NULL,1795394449440634,NULL,NULL,0,0,'shop-a',NULL,1,NULL,NULL,NULL);
CREATE INDEX ix_jobs_state ON jobs (state);
COMMIT;
